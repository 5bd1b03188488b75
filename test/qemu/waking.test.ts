import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { existsSync, readdirSync, renameSync, rmSync, statSync, truncateSync, writeFileSync } from "node:fs";
import process from "node:process";
import { test, type TestContext } from "node:test";
import { setImmediate } from "node:timers/promises";
import { execa } from "execa";
import type { FleetOptions } from "../../plugins/qemu/fleet.ts";
import { Power } from "../../plugins/qemu/power.ts";
import { isAlive } from "../../plugins/shared/proc.ts";
import { ConnectionLost } from "../../plugins/qemu/socket.ts";
import type { Link } from "../../plugins/qemu/vm.ts";
import { capturedLogs, cleanup, temporaryFolder, until } from "../helpers.ts";
import { fleetOf, QemuFixture } from "./fixture.ts";
import { skipQemu } from "./guest.ts";
import { idleImage } from "./idle.ts";
import { say, scripted } from "./scripted.ts";

const NEVER = new AbortController().signal;
const options = { skip: skipQemu, timeout: 300_000 };

/** A machine that runs, and hears nobody. */
async function awake(t: TestContext, given: Partial<FleetOptions> = {}) {
  const fixture = new QemuFixture(t, "qemu-microvm", idleImage(t, { agent: false }), given);
  const instance = fixture.instance();
  const driver = fixture.open();
  await driver.create(instance);
  await driver.start(instance, NEVER);
  return { fixture, instance, driver };
}

test("stop() of what sleeps leaves it asleep where it may wake another time", options, async (t) => {
  const { fixture, instance, ...world } = await awake(t, { grace: 1_000 });
  let { driver } = world;
  await driver.standby(instance, NEVER);
  const over = AbortSignal.abort(new Error("somebody else was faster"));
  await assert.rejects(driver.stop(instance, over), /somebody else was faster/);
  assert.equal((await driver.inspect(instance)).state, "Standby");

  // Somebody kills QEMU, and then the host closes, as it takes over the state.
  for (const cut of [() => process.kill(fixture.process(instance)!.pid, "SIGKILL"), () => fixture.close()]) {
    const vm = fixture.fleet!.vm(instance.id);
    const stopped = assert.rejects(driver.stop(instance, NEVER));
    while (!vm.link) await setImmediate();
    await cut();
    await stopped;
    assert.ok(fixture.records(instance).snapshot());
  }
  driver = fixture.open();
  assert.equal((await driver.adopt(instance)).state, "Standby");
  assert.equal(await driver.restore(instance, NEVER), "Running");
  await driver.delete(instance);
  assert.deepEqual(fixture.remains(instance), []);
});

test("stop() of what can never wake ends it, and tells what that has cost", options, async (t) => {
  const logs = capturedLogs(t);
  const { fixture, instance, driver } = await awake(t);
  await driver.standby(instance, NEVER);
  truncateSync(fixture.records(instance).path("state"), 1_000);
  const exit = { exit_code: null, exit_message: "it was ended in its sleep" };
  assert.deepEqual(await driver.stop(instance, NEVER), exit);
  assert.deepEqual(await driver.inspect(instance), { state: "Stopped", ...exit });
  assert.match(logs.join(), /^warning: Lost the memory of .*: QEMU ended: .+/);
});

// Memory is given up for a start, and for nothing less.
test("restore() keeps what sleeps where it cannot be started anew either", options, async (t) => {
  const { fixture, instance, driver } = await awake(t);
  await driver.standby(instance, NEVER);
  const records = fixture.records(instance);
  renameSync(records.ram, `${records.ram}.away`);
  const policies = { restore_fallback: "start" };
  const changed = { ...instance, policies, cmd: ["true"], env: { LONG: "x".repeat(2_000) } };
  await assert.rejects(driver.restore(changed, NEVER), /too long/);
  rmSync(records.ram);
  renameSync(`${records.ram}.away`, records.ram);
  assert.equal(await driver.restore(instance, NEVER), "Running");
  await driver.delete(instance);
});

test("stop() has an eye on what a guest writes until it has ended", options, async (t) => {
  const log_max_size = 65_536;
  const { fixture, instance, driver } = await awake(t, { grace: 60_000, log_max_size });
  let stopped = false;
  const enough = new AbortController();
  const stopping = driver.stop(instance, enough.signal).finally(() => stopped = true);
  const exit = fixture.records(instance).path("exit");
  writeFileSync(exit, Buffer.alloc(10 * log_max_size));
  await until("it is cut", () => statSync(exit).size <= log_max_size);
  assert.ok(!stopped, "its guest hears nobody");
  enough.abort();
  await stopping;
  await driver.delete(instance);
});

// The kernel shows that it is gone before this process has read what it said.
test("inspect() knows why a machine has ended whose last words are still to be read", options, async (t) => {
  const { fixture, instance, driver } = await awake(t);
  const main = fixture.process(instance)!;
  process.kill(main.pid, "SIGTERM");
  while (isAlive(main)); // nothing else is done meanwhile
  const exit = { exit_code: null, exit_message: "QEMU was ended by a signal" };
  assert.deepEqual(await driver.inspect(instance), { state: "Stopped", ...exit });
  await driver.delete(instance);
});

test("inspect() waits for the end of a machine whose monitor has ended before it", options, async (t) => {
  const { fixture, instance, driver } = await awake(t);
  const main = fixture.process(instance)!;
  await fixture.close();
  process.kill(main.pid, "SIGSTOP"); // what it does next is played here
  const socket = fixture.records(instance).path("run/qmp.sock");
  rmSync(socket);
  await scripted(t, {
    greet: (peer) => say(peer, { QMP: { version: {}, capabilities: [] } }),
    answer: (peer, { execute, id }) => {
      if (execute !== "query-status") return say(peer, { return: {}, id });
      peer.destroy();
      setTimeout(() => process.kill(main.pid, "SIGKILL"), 300);
    },
  }, socket);
  assert.equal((await fixture.open().inspect(instance)).state, "Stopped");
  await driver.delete(instance);
});

test("a copy of a data_dir does not touch the machines of the first", options, async (t) => {
  const { fixture, instance, driver } = await awake(t);
  const main = fixture.process(instance)!;
  const copy = new QemuFixture(t, "qemu-microvm", instance.image);
  await execa("cp", ["-a", `${fixture.dataDir}/.`, copy.dataDir]);
  const other = copy.open();
  assert.equal((await other.adopt(instance)).state, "Stopped");
  assert.equal(await other.start(instance, NEVER), "Running");
  assert.ok(isAlive(main));
  await other.stop(instance, AbortSignal.timeout(100));
  await other.delete(instance);
  assert.ok(isAlive(main));
  assert.equal((await driver.inspect(instance)).state, "Running");
  await driver.stop(instance, AbortSignal.timeout(100));
  await driver.delete(instance);
});

test("a copy of a data_dir does not touch the memory of the first in a ram_dir of both", options, async (t) => {
  const ram_dir = temporaryFolder(t);
  const { fixture, instance, driver } = await awake(t, { ram_dir });
  const main = fixture.process(instance)!;
  const copy = new QemuFixture(t, "qemu-microvm", instance.image, { ram_dir });
  const copied = async () => {
    await execa("cp", ["-a", `${fixture.dataDir}/.`, copy.dataDir]);
    const other = copy.open();
    const reading = await other.adopt(instance);
    assert.match(reading.state === "Unknown" ? reading.error : reading.state, /of another data_dir$/);
    for (const work of ["start", "stop", "standby", "restore"] as const) {
      await assert.rejects(other[work](instance, NEVER), /of another data_dir/, work);
    }
    await other.delete(instance);
    assert.ok(!existsSync(copy.records(instance).folder));
  };
  await copied();
  assert.ok(isAlive(main));
  await driver.standby(instance, NEVER);
  await copied();
  assert.equal(await driver.restore(instance, NEVER), "Running");
  await driver.stop(instance, AbortSignal.timeout(100));
  await driver.delete(instance);
  assert.deepEqual(readdirSync(ram_dir), []);
});

test("ask() gives a guest its time that has heard, whatever becomes of the monitor", async (t) => {
  const dataDir = temporaryFolder(t);
  const fleet = fleetOf(dataDir);
  cleanup(t).defer(() => fleet[Symbol.asyncDispose]());
  const power = new Power("qemu-microvm", fleet);
  const fixture = new QemuFixture(t, "qemu-microvm", "/no/such/image");
  const lostAfter = (answers: number) => {
    const execute = () => answers-- > 0 ? Promise.resolve({}) : Promise.reject(new ConnectionLost("gone"));
    return power.ask({ qmp: { execute } } as unknown as Link, fixture.instance(), NEVER);
  };
  await lostAfter(1);
  await assert.rejects(lostAfter(0), ConnectionLost);
});
