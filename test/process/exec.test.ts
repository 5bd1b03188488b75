import assert from "node:assert/strict";
import { chmodSync, existsSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { test, type TestContext } from "node:test";
import { DormouseError, type ExecRequest, type Instance } from "../../main.ts";
import { processStat } from "../../plugins/shared/proc.ts";
import { lacking, temporaryFolder, until } from "../helpers.ts";
import { NEEDS_ROOT, ProcessFixture } from "./fixture.ts";

const NEVER = new AbortController().signal;

async function running(t: TestContext, change: Partial<Instance> = {}) {
  const fixture = new ProcessFixture(t);
  const driver = fixture.open();
  const instance = { ...fixture.counting(), ...change };
  await driver.create(instance);
  await driver.start(instance, NEVER);
  const exec = (script: string, request: Partial<ExecRequest> = {}) =>
    driver.exec(instance, { command: ["sh", "-c", script], timeout_ms: 60_000, max_output: 65_536, ...request });
  return { fixture, driver, instance, exec };
}

test("exec() tells the exit code and both outputs", async (t) => {
  const { exec } = await running(t);
  const done = { timed_out: false, truncated: false };
  assert.deepEqual(await exec("echo out; echo err >&2; exit 3"), {
    exit_code: 3,
    stdout: "out\n",
    stderr: "err\n",
    ...done,
  });
  assert.deepEqual(await exec("kill -KILL $$"), { exit_code: 137, stdout: "", stderr: "", ...done });
  assert.equal((await exec("cat")).stdout, "");
});

test("exec() runs with the instance's variables and directory, and those of the request over them", async (t) => {
  const { exec } = await running(t, { env: { A: "instance", B: "instance" }, working_dir: "/usr" });
  assert.equal((await exec("pwd; echo $A $B")).stdout, "/usr\ninstance instance\n");
  const given = await exec("pwd; echo $A $B", { env: { B: "request" }, working_dir: "/tmp" });
  assert.equal(given.stdout, "/tmp\ninstance request\n");
});

test("exec() runs as the instance's user, in its cgroup", { skip: lacking(NEEDS_ROOT) }, async (t) => {
  const { exec, fixture, instance } = await running(t, { run_as: "nobody" });
  const { stdout } = await exec("id -u; cat /proc/self/cgroup");
  assert.equal(stdout.split("\n")[0], "65534");
  assert(fixture.cgroups(instance).length > 0);
  assert(stdout.includes(`/${instance.id}\n`));
});

test("exec() keeps max_output bytes of each output", async (t) => {
  const { exec } = await running(t);
  const { stdout, stderr, truncated } = await exec("head -c 100000 /dev/zero | tr '\\0' x; echo short >&2", {
    max_output: 1000,
  });
  assert.deepEqual([stdout, stderr, truncated], ["x".repeat(1000), "short\n", true]);
  const exact = await exec("printf 12345", { max_output: 5 });
  assert.deepEqual([exact.stdout, exact.truncated], ["12345", false]);
});

test("exec() kills the whole group at its deadline", async (t) => {
  const { exec } = await running(t);
  let result = await exec("sleep 600 & echo $!; sleep 600", { timeout_ms: 300 });
  // Late it is on a machine that has not begun it by then.
  for (let ms = 600; result.stdout === "" && ms < 60_000; ms *= 2) {
    result = await exec("sleep 600 & echo $!; sleep 600", { timeout_ms: ms });
  }
  assert.deepEqual([result.timed_out, result.exit_code], [true, 137]);
  const pid = Number(result.stdout);
  await until("the child is gone", () => (processStat(pid)?.state ?? "Z") === "Z");
});

// A program like setpriv that runs as root whoever calls it; only root can make one, and only others need it.
const { BECOME_ROOT } = process.env;
if (BECOME_ROOT) {
  test("exec() answers at its deadline also where the command has become root, which nobody here may end", async (t) => {
    const { exec } = await running(t);
    const folder = temporaryFolder(t);
    chmodSync(folder, 0o777); // root without its capabilities is as others are
    // It ends by itself, as nobody else can end it.
    const begin = async (request: (began: Promise<void>) => Partial<ExecRequest>) => {
      const file = join(folder, `${Math.random()}`);
      const began = until("it is root", () => existsSync(file));
      await exec(`exec ${BECOME_ROOT} --reuid=0 -- sh -c ': >${file}; sleep 8'`, request(began));
    };
    await assert.rejects(begin(() => ({ timeout_ms: 5_000 })), /the command may not be ended by this host/);
    const gone = new AbortController();
    const left = begin((began) => (began.then(() => gone.abort()), { signal: gone.signal }));
    await assert.rejects(left, /the command may not be ended by this host/);
    assert.equal((await exec("echo well")).stdout, "well\n");
  });
}

test("exec() does not wait for what it leaves in the background", async (t) => {
  const { exec } = await running(t);
  const result = await exec("sleep 600 & echo done");
  assert.deepEqual([result.stdout, result.exit_code, result.timed_out], ["done\n", 0, false]);
});

test("exec() leaves nothing behind where no cgroup would end it with the instance", async (t) => {
  const fixture = new ProcessFixture(t, { cgroup_parent: "" });
  const driver = fixture.open();
  const instance = fixture.counting();
  await driver.create(instance);
  await driver.start(instance, NEVER);
  const command = ["sh", "-c", "sleep 600 & echo $!"];
  const { stdout } = await driver.exec(instance, { command, timeout_ms: 60_000, max_output: 100 });
  const pid = Number(stdout);
  await until("the child is gone", () => (processStat(pid)?.state ?? "Z") === "Z");
  assert.equal((await driver.inspect(instance)).state, "Running");
  await driver.delete(instance);
});

test("exec() kills its group and rejects with the reason when its signal aborts", async (t) => {
  const { exec } = await running(t);
  const [abort, reason] = [new AbortController(), new Error("the client left")];
  const pending = exec("sleep 600", { signal: abort.signal });
  abort.abort(reason);
  await assert.rejects(pending, (error) => error === reason);
});

test("exec() is refused where nothing runs, and ends with its instance", async (t) => {
  const { driver, exec, fixture, instance } = await running(t);
  const refused = (error: unknown) => error instanceof DormouseError && error.code === "invalid_state";
  await driver.standby(instance, NEVER);
  await assert.rejects(exec("true"), refused);
  await driver.restore(instance, NEVER);
  const mark = join(fixture.dataDir, "begun");
  const ended = assert.rejects(exec(`: >${mark}; sleep 600`));
  await until("it runs", () => existsSync(mark));
  await driver.stop(instance, NEVER);
  await ended;
  await assert.rejects(exec("true"), refused);
  await driver.delete(instance);
  assert.deepEqual(fixture.remains(instance), []);
});

test("exec() tells a program that is not there", async (t) => {
  const { exec } = await running(t);
  const refused = (error: unknown) => error instanceof DormouseError && error.code === "invalid_request";
  await assert.rejects(exec("", { command: ["no-such-program"] }), refused);
  await assert.rejects(exec("", { command: [] }), refused);
});
