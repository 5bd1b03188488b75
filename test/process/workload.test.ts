import assert from "node:assert/strict";
import { copyFileSync, existsSync, mkdirSync, readFileSync, realpathSync, symlinkSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import process from "node:process";
import { test, type TestContext } from "node:test";
import { execa } from "execa";
import { DormouseError, type Instance, type Network } from "../../main.ts";
import { processStat } from "../../plugins/shared/proc.ts";
import { argumentsOf, lacking, temporaryFolder, until } from "../helpers.ts";
import { instanceOf, IS_ROOT, NEEDS_ROOT, PATH, processesOf, ProcessFixture } from "./fixture.ts";

const NEVER = new AbortController().signal;
const ROOT_ONLY = { skip: lacking(NEEDS_ROOT) };

/** Runs the instance to its end; its output and its exit. */
async function outcome(fixture: ProcessFixture, instance: Instance) {
  const driver = fixture.open();
  await driver.create(instance);
  const changed = fixture.changed(instance);
  await driver.start(instance, NEVER);
  await changed;
  const reading = await driver.inspect(instance);
  const output = readFileSync(join(fixture.folder(instance), "app.log"), "utf8");
  await driver.delete(instance);
  assert(reading.state === "Stopped");
  return { output, code: reading.exit_code, message: reading.exit_message };
}

test("start() gives the program exactly env, PATH and HOME", async (t) => {
  const env = { A: "1", "with.dot": "x y", "-u": "--", EMPTY: "", LINES: "a\nb", QUOTE: "'\"$(id)`id`" };
  const { output } = await outcome(new ProcessFixture(t), instanceOf(["env", "-0"], { env }));
  const found = Object.fromEntries(
    output.split("\0").filter(Boolean).map((line) => {
      const at = line.indexOf("=");
      return [line.slice(0, at), line.slice(at + 1)];
    }),
  );
  assert.deepEqual(found, { ...env, PATH, HOME: process.env.HOME ?? "/" });
  const own = { PATH: "/usr/bin:/bin", HOME: "/tmp" };
  const second = await outcome(new ProcessFixture(t), instanceOf(["env"], { env: own }));
  assert.deepEqual(second.output.trim().split("\n").sort(), ["HOME=/tmp", "PATH=/usr/bin:/bin"]);
});

test("start() keeps the values of env out of the arguments that everybody may read", async (t) => {
  const fixture = new ProcessFixture(t);
  const driver = fixture.open();
  const instance = instanceOf(["sleep", "600"], { env: { TOKEN: "correct-horse" } });
  await driver.create(instance);
  await driver.start(instance, NEVER);
  const commands = () => processesOf(instance).map(({ pid }) => argumentsOf(pid));
  await until("it is the program", () => commands().includes(["sleep", "600", ""].join("\0")));
  assert(!commands().join().includes("correct-horse"));
  await driver.delete(instance);
});

test("start() passes arguments as they are, from entrypoint and then cmd", async (t) => {
  const args = ["a b", "", "$HOME", "`id`", "--", "-n", "ü", "x\ny"];
  const instance = instanceOf(args, { entrypoint: ["printf", "<%s>"] });
  assert.equal((await outcome(new ProcessFixture(t), instance)).output, args.map((arg) => `<${arg}>`).join(""));
});

test("start() begins in working_dir, and in / where there is none", async (t) => {
  const folder = realpathSync(temporaryFolder(t));
  for (const [working_dir, expected] of [[null, "/"], [folder, folder]]) {
    assert.equal(
      (await outcome(new ProcessFixture(t), instanceOf(["pwd", "-P"], { working_dir }))).output,
      `${expected}\n`,
    );
  }
  writeFileSync(join(folder, "tool"), "#!/bin/sh\necho found\n", { mode: 0o755 });
  const relative = instanceOf(["./tool"], { working_dir: folder });
  assert.equal((await outcome(new ProcessFixture(t), relative)).output, "found\n");
});

test("start() ignores no signal, leads a session of its own and reads nothing", async (t) => {
  const script = "read x || echo nothing; grep SigIgn /proc/self/status; cut -d' ' -f1,6 /proc/$$/stat";
  const { output } = await outcome(new ProcessFixture(t), instanceOf(script));
  const [nothing, ignored, ids] = output.trim().split("\n");
  assert.equal(nothing, "nothing");
  // The low 31 bits are the signals that have names; those above belong to the C library.
  assert.equal(BigInt(`0x${ignored.split("\t")[1]}`) & 0x7fff_ffffn, 0n);
  const [pid, session] = ids.split(" ");
  assert.equal(pid, session);
});

test("inspect() tells how it ended", async (t) => {
  const cases: Record<string, [number, string]> = {
    "exit 0": [0, "exited with code 0"],
    "exit 255": [255, "exited with code 255"],
    "exit 137": [137, "exited with code 137"],
    "kill -KILL $$": [137, "killed by SIGKILL"],
    "kill -SEGV $$": [139, "killed by SIGSEGV"],
    "kill -INT $$": [130, "killed by SIGINT"],
    "kill -PIPE $$": [141, "killed by SIGPIPE"],
  };
  for (const [script, [code, message]] of Object.entries(cases)) {
    const found = await outcome(new ProcessFixture(t), instanceOf(script));
    assert.deepEqual([found.code, found.message], [code, message], script);
  }
});

test("start() runs it as run_as, without other groups", ROOT_ONLY, async (t) => {
  const cases = { "nobody": "65534:65534", "1234": "1234:1234", "1234:0": "1234:0", "nobody:daemon": "65534:1" };
  for (const [run_as, expected] of Object.entries(cases)) {
    const instance = instanceOf('echo "$(id -u):$(id -g) $(id -G)"; grep CapEff /proc/self/status', { run_as });
    const [ids, capabilities] = (await outcome(new ProcessFixture(t), instance)).output.trim().split("\n");
    assert.equal(ids, `${expected} ${expected.split(":")[1]}`, run_as);
    assert.equal(capabilities, "CapEff:\t0000000000000000");
  }
});

/** A directory with a shell and a program, to be a root. */
async function image(t: TestContext): Promise<string> {
  const root = realpathSync(temporaryFolder(t));
  for (const program of ["/bin/sh", "/usr/bin/env", "/bin/cat"]) {
    const { stdout } = await execa("ldd", [program]);
    const libraries = [...stdout.matchAll(/(\/\S+)/g)].map(([, file]) => file);
    for (const file of [program, ...libraries]) {
      mkdirSync(join(root, dirname(file)), { recursive: true });
      copyFileSync(file, join(root, file));
    }
  }
  mkdirSync(join(root, "srv"));
  writeFileSync(join(root, "srv", "mine"), "inside\n");
  symlinkSync("/srv/mine", join(root, "link"));
  symlinkSync("/etc/passwd", join(root, "escape"));
  await execa("chmod", ["0755", root]);
  return root;
}

test("start() runs an image of a directory inside of it", ROOT_ONLY, async (t) => {
  const root = await image(t);
  const fixture = new ProcessFixture(t);
  const change = { image: `dir:${root}`, working_dir: "/srv", env: { A: "1" }, run_as: "1234" };
  const { output } = await outcome(fixture, instanceOf("env; pwd; cat mine /link; cat /escape || echo none", change));
  const lines = output.trim().split("\n");
  for (const line of ["A=1", "HOME=/", `PATH=${PATH}`, "/srv", "inside", "none"]) assert(lines.includes(line), line);
  const driver = fixture.open();
  const instance = instanceOf("while :; do /bin/cat mine; done", change);
  assert.deepEqual(await driver.stat(instance, "/escape", true), await driver.stat(instance, "/nothing", true));
  assert.equal((await driver.stat(instance, "/link", true)).size, 7);
  const preload = instanceOf("true", { ...change, env: { LD_PRELOAD: "/tmp/evil.so" } });
  await assert.rejects(driver.validate(preload), /"LD_PRELOAD" cannot be set/);
  await assert.rejects(driver.validate(instanceOf(["python3"], change)), /"python3" is not in PATH/);
});

test("start() tells what kept the program from beginning, and runs nothing", ROOT_ONLY, async (t) => {
  const network = {
    enabled: true,
    attach: () => Promise.resolve({ namespace: "dormouse-test-missing", host_device: "none" }),
  } as unknown as Network;
  const fixture = new ProcessFixture(t, { network });
  const driver = fixture.open();
  const instance = instanceOf(["sleep", "600"], { network: { enabled: true, ip: "10.0.0.2", mac: null, ip6: null } });
  await driver.create(instance);
  await assert.rejects(driver.start(instance, NEVER), /could not begin: nsenter: .*dormouse-test-missing/);
  assert.equal((await driver.inspect(instance)).state, "Stopped");
  assert.deepEqual(processesOf(instance), []);
});

const DAEMON = "setsid sh -c 'trap \"\" TERM HUP; while :; do sleep 0.1; done' & sleep 0.1; ";

for (const [how, rest] of Object.entries({ "stop()": "sleep 600", "its own end": "exit 0", "delete()": "sleep 600" })) {
  test(`a daemon that left the session and ignores SIGTERM dies with ${how}`, ROOT_ONLY, async (t) => {
    const fixture = new ProcessFixture(t);
    const driver = fixture.open();
    const instance = instanceOf(DAEMON + rest);
    await driver.create(instance);
    const changed = fixture.changed(instance);
    await driver.start(instance, NEVER);
    if (how === "its own end") {
      await changed;
    } else {
      await until("the daemon is there", () => new Set(processesOf(instance).map(sessionOf)).size >= 3);
      await (how === "stop()" ? driver.stop(instance, NEVER) : driver.delete(instance));
    }
    await until("nothing is left", () => processesOf(instance).length === 0);
    await driver.delete(instance);
    assert.deepEqual(fixture.remains(instance), []);
  });
}

test("without cgroups, what it left in its session dies after its own end", async (t) => {
  const fixture = new ProcessFixture(t, { cgroup_parent: "" });
  const driver = fixture.open();
  const instance = instanceOf("sleep 600 & exit 0");
  await driver.create(instance);
  await driver.start(instance, NEVER);
  await until("nothing is left", () => processesOf(instance).length === 0);
  assert.equal((await driver.inspect(instance)).state, "Stopped");
});

test("stop() sends SIGTERM to every process, and waits for them to end in their own way", async (t) => {
  const fixture = new ProcessFixture(t);
  const driver = fixture.open();
  const child = "trap 'echo child; exit' TERM; echo ready; while :; do sleep 0.05; done";
  const instance = instanceOf(`trap 'wait; echo parent; exit 7' TERM; sh -c "${child}" & while :; do wait; done`);
  await driver.create(instance);
  await driver.start(instance, NEVER);
  const log = join(fixture.folder(instance), "app.log");
  await until("it is ready", () => readFileSync(log, "utf8").includes("ready"));
  assert.deepEqual(await driver.stop(instance, NEVER), { exit_code: 7, exit_message: "exited with code 7" });
  const said = readFileSync(log, "utf8").trim().split("\n").filter((line) => line !== "Terminated");
  assert.deepEqual(said, ["ready", "child", "parent"]);
  await driver.delete(instance);
});

test("stop() ends what will not end after the grace", async (t) => {
  const fixture = new ProcessFixture(t, { grace: 100 });
  const driver = fixture.open();
  const instance = fixture.stubborn();
  await driver.create(instance);
  await driver.start(instance, NEVER);
  await until("it counts", async () => await fixture.count(instance) > 0);
  assert.deepEqual(await driver.stop(instance, NEVER), { exit_code: 137, exit_message: "killed by SIGKILL" });
});

test("start() limits memory, and inspect() tells what went over it", ROOT_ONLY, async (t) => {
  const instance = instanceOf("x=$(head -c 300000000 /dev/zero | tr '\\0' x); echo done", {
    memory_bytes: 32 * 2 ** 20,
  });
  const { message, output } = await outcome(new ProcessFixture(t), instance);
  if (output.includes("done")) return t.skip("no memory controller");
  assert.match(message!, /out of memory|exited with code/);
});

test("standby() gives memory back", ROOT_ONLY, async (t) => {
  const fixture = new ProcessFixture(t);
  const driver = fixture.open();
  const file = join(fixture.dataDir, "read");
  const instance = instanceOf(`head -c 50000000 /dev/zero >${file}; sync ${file}; echo 1; sleep 600`);
  await driver.create(instance);
  await driver.start(instance, NEVER);
  const usage = fixture.cgroups(instance).flatMap((folder) => [
    join(folder, "memory.current"),
    join(folder, "memory.usage_in_bytes"),
  ]).find((name) => existsSync(name));
  if (!usage) return t.skip("no memory controller");
  const used = () => Number(readFileSync(usage, "utf8"));
  // A machine that is short of memory takes back some at once.
  let most = 0;
  await until("it has written", async () => {
    most = Math.max(most, used());
    return await fixture.count(instance) === 1;
  });
  assert(Math.max(most, used()) > 40_000_000);
  await driver.standby(instance, NEVER);
  await until("it holds less", () => used() < 10_000_000);
  await driver.delete(instance);
});

test("fork() copies what is stopped and refuses what runs", async (t) => {
  const fixture = new ProcessFixture(t);
  const driver = fixture.open();
  const [source, target] = [fixture.counting(), fixture.counting()];
  await driver.create(source);
  await driver.fork(source, target);
  assert.equal((await driver.inspect(target)).state, "Stopped");
  await driver.start(source, NEVER);
  const refused = (error: unknown) => error instanceof DormouseError && error.code === "invalid_state";
  await assert.rejects(driver.fork(source, fixture.counting()), refused);
});

test("a program without root's rights cannot be another user or have another root", {
  skip: IS_ROOT ? "it needs to be without root" : false,
}, async (t) => {
  const driver = new ProcessFixture(t).open();
  for (const change of [{ run_as: "nobody" }, { image: "dir:/tmp" }]) {
    await assert.rejects(driver.validate(instanceOf("true", change)), /needs a host that runs as root/);
  }
});

function sessionOf({ pid }: { pid: number }): number | undefined {
  return processStat(pid)?.session;
}
