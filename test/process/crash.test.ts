import assert from "node:assert/strict";
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { test } from "node:test";
import { execa } from "execa";
import type { Instance } from "../../main.ts";
import { delay } from "../../plugins/shared/async.ts";
import { type ProcessId, processStat } from "../../plugins/shared/proc.ts";
import { argumentsOf, lacking, ROOT, RUNTIME, until } from "../helpers.ts";
import { CGROUP_PARENT, NEEDS_ROOT, processesOf, ProcessFixture } from "./fixture.ts";

const ROUNDS = 12;
const NEVER = new AbortController().signal;

for (const cgroup_parent of [CGROUP_PARENT, ""]) {
  const skip = lacking(cgroup_parent === "" ? null : NEEDS_ROOT);
  const how = cgroup_parent === "" ? "without cgroups" : "with cgroups";
  test(
    `adopt() finds what a host left that was killed at any moment, ${how}`,
    { skip, timeout: 900_000 },
    async (t) => {
      const fixture = new ProcessFixture(t, { cgroup_parent });
      const instance = fixture.counting();
      for (let round = 0; round < ROUNDS; round++) {
        const ran = await killedHost(fixture.dataDir, cgroup_parent, instance);
        const driver = fixture.open();
        const reading = await driver.adopt(instance);
        const context = `round ${round}, killed after ${ran} ms: ${JSON.stringify(reading)}`;
        assert.notEqual(reading.state, "Unknown", context);
        if (reading.state === "Stopped") {
          // Nothing of it runs, and nothing that is still on its way begins after this.
          await until(`all of it ends, ${context}`, () => processesOf(instance).length === 0);
          assert.equal((await driver.inspect(instance)).state, "Stopped", context);
        } else {
          // Killed between the SIGTERM of a stop and the thaw that lets it arrive, it ends instead.
          const ended = async () => (await driver.inspect(instance)).state === "Stopped";
          await until(`one program, ${context}`, async () => programs(instance).length === 1 || await ended());
          if (reading.state !== "Running") await driver.restore(instance, NEVER);
          const before = await fixture.count(instance);
          await until(`it goes on, ${context}`, async () => await fixture.count(instance) > before || await ended());
        }
        await driver.start(instance, NEVER);
        await only(instance, context);
        await driver.delete(instance);
        assert.deepEqual(fixture.remains(instance), [], context);
        // A shell of the launch that was withdrawn can be on its way to find that out; it begins nothing any more.
        await until(`no process is left, ${context}`, () => processesOf(instance).length === 0);
      }
    },
  );
}

test("sweep() removes what belongs to no instance and leaves the others alone", async (t) => {
  const fixture = new ProcessFixture(t, { cgroup_parent: NEEDS_ROOT === null ? CGROUP_PARENT : "" });
  const [kept, stray] = [fixture.counting(), fixture.counting()];
  const driver = fixture.open();
  for (const instance of [kept, stray]) {
    await driver.create(instance);
    await driver.start(instance, NEVER);
    await until("it counts", async () => await fixture.count(instance) > 0);
  }
  const next = fixture.open();
  assert.deepEqual(await next.sweep(new Set([kept.id])), [stray.id]);
  assert.deepEqual(processesOf(stray), []);
  assert.equal((await next.inspect(kept)).state, "Running");
  assert.deepEqual(await next.sweep(new Set([kept.id])), []);
});

test("sweep() removes a cgroup whose folder is gone", { skip: lacking(NEEDS_ROOT) }, async (t) => {
  const fixture = new ProcessFixture(t);
  const instance = fixture.counting();
  const driver = fixture.open();
  await driver.create(instance);
  await driver.start(instance, NEVER);
  await until("it counts", async () => await fixture.count(instance) > 0);
  await execa("rm", ["-rf", fixture.folder(instance)]);
  assert.deepEqual(await fixture.open().sweep(new Set()), [instance.id]);
  // What waited for it is told apart by its folder only, and ends by itself.
  await until("nothing of it is left", () => fixture.remains(instance).length === 0);
});

test("two data_dirs do not see each other's instances as strays", { skip: lacking(NEEDS_ROOT) }, async (t) => {
  const [ours, theirs] = [new ProcessFixture(t), new ProcessFixture(t)];
  const instance = theirs.counting();
  const driver = theirs.open();
  await driver.create(instance);
  await driver.start(instance, NEVER);
  assert.deepEqual(await ours.open().sweep(new Set()), []);
  assert.equal((await driver.inspect(instance)).state, "Running");
});

test("a copy of a data_dir does not touch the processes of the first", async (t) => {
  const [first, copy] = [new ProcessFixture(t), new ProcessFixture(t)];
  const instance = first.counting();
  const driver = first.open();
  await driver.create(instance);
  await driver.start(instance, NEVER);
  await until("it counts", async () => await first.count(instance) > 0);
  const [main] = await only(instance);
  const running = () => programs(instance).some(({ pid, started }) => pid === main.pid && started === main.started);
  const copied = async () => {
    await execa("cp", ["-a", `${first.dataDir}/.`, copy.dataDir]);
    assert(existsSync(claimFile(copy, instance)));
    return copy.open();
  };
  let other = await copied();
  assert.equal((await other.adopt(instance)).state, "Stopped");
  await other.stop(instance, NEVER);
  await other.delete(instance);
  assert(running());
  other = await copied();
  await other.start(instance, NEVER);
  assert(running());
  await other.delete(instance);
  assert(running());
  assert.equal((await driver.inspect(instance)).state, "Running");
});

// H8: neither called alive nor signalled.
test("inspect() does not take a process for ours that got the pid later", async (t) => {
  const fixture = new ProcessFixture(t, { cgroup_parent: "" });
  const instance = fixture.counting();
  const driver = fixture.open();
  await driver.create(instance);
  await driver.start(instance, NEVER);
  const [main] = await only(instance);
  const stranger = execa("sleep", ["600"], { detached: true, reject: false });
  const pid = stranger.pid!;
  try {
    const file = claimFile(fixture, instance);
    const claim = readFileSync(file, "utf8");
    // Ours ends, and its pid is given to a stranger: the same, seen from the file.
    await driver.stop(instance, NEVER);
    const started = processStat(pid)!.started;
    const recycled = claim.replace(`${main.pid} ${main.started} `, `${pid} ${started - 1} `);
    await execa("tee", [file], { input: recycled });
    assert.equal((await fixture.open().adopt(instance)).state, "Stopped");
    await fixture.open().stop(instance, NEVER);
    await fixture.open().delete(instance);
    assert.equal(processStat(pid)?.started, started);
  } finally {
    stranger.kill("SIGKILL");
    await stranger;
  }
});

test("inspect() says that the exit is not known where what waits for it was killed", async (t) => {
  const fixture = new ProcessFixture(t);
  const instance = fixture.counting();
  const driver = fixture.open();
  await driver.create(instance);
  await driver.start(instance, NEVER);
  await until("it counts", async () => await fixture.count(instance) > 0);
  const [main] = await only(instance);
  const shim = processStat(main.pid)!.parent;
  process.kill(shim, "SIGKILL");
  assert.equal((await driver.inspect(instance)).state, "Running");
  const exit = await driver.stop(instance, NEVER);
  assert.deepEqual(exit, {
    exit_code: null,
    exit_message: "its exit status is not known: what waited for it was killed",
  });
  await driver.delete(instance);
  assert.deepEqual(fixture.remains(instance), []);
});

/** Starts a host on the instance and kills it in the middle of what it does; after how many milliseconds. */
async function killedHost(dataDir: string, cgroup_parent: string, instance: Instance): Promise<number> {
  const [command, ...flags] = RUNTIME;
  const script = join(ROOT, "test", "process", "host.ts");
  const host = execa(command, [...flags, script, dataDir, cgroup_parent, JSON.stringify(instance)], {
    reject: false,
    buffer: false,
    stderr: "inherit",
  });
  const output = host.nodeChildProcess.stdout!;
  await new Promise((resolve) => output.once("data", resolve));
  // A moment of its own in each round; which one it hits is up to the machine.
  const ms = Math.random() * 120;
  await delay(ms);
  host.nodeChildProcess.kill("SIGKILL");
  await host;
  return ms;
}

/** The first processes of the programs that run for the instance: there should never be two. */
function programs(instance: Instance): ProcessId[] {
  return processesOf(instance).filter(({ pid }) => {
    const leads = processStat(pid)?.session === pid;
    const words = argumentsOf(pid); // none between two programs of one process, too
    return leads && words !== "" && !words.includes("\0dormouse-shim\0");
  });
}

/** Its one program, once it is there and no other is: between two programs a process has no arguments to know it by. */
async function only(instance: Instance, context = "first"): Promise<ProcessId[]> {
  await until(`one program, ${context}`, () => programs(instance).length === 1);
  return programs(instance);
}

function claimFile(fixture: ProcessFixture, instance: Instance): string {
  const run = join(fixture.folder(instance), "run");
  return join(run, `${readFileSync(join(run, "launch"), "utf8").split("\n")[0]}.pid`);
}
