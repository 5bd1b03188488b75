import assert from "node:assert/strict";
import { test } from "node:test";
import { capturedLogs, temporaryFolder } from "../helpers.ts";
import { gate, ScriptedDriver } from "../hypervisor/scripted.ts";
import { ManualClock, settle } from "../clock.ts";
import { flow, ORIGIN, ScriptedKernel, world } from "./world.ts";

const POLICY = { enabled: true, idle_timeout: "10s" };

// I23: the idle clock runs from the start, also where nobody ever connects.
test("an instance goes to standby after its idle timeout when nobody ever connects", async (t) => {
  const { instance, clock, state, events, said } = await world(t);
  const { id } = await instance();
  await clock.pass(9_999);
  assert.equal(state(id), "Running");
  await clock.pass(1);
  assert.equal(state(id), "Standby");
  const slept = events.find(({ action }) => action === "standby")!;
  assert.deepEqual([slept.actor, slept.cause], ["auto-standby", "idle"]);
  assert.equal(typeof slept.detail.idle_since, "string");
  assert.deepEqual(said(), ["requested ready_for_standby", "slept idle"]);
});

// I21, I1: a connection that is open counts, however silent, from its first packet on.
test("an instance stays awake while anything is connected, and sleeps after the last one went", async (t) => {
  const { instance, clock, kernel, state } = await world(t);
  const { id } = await instance();
  kernel.set(flow({ state: "SYN_SENT" }));
  kernel.set(flow());
  kernel.set(flow({ source_port: 5, source: "2001:db8::1", destination: "fd88::2" }));
  await clock.pass(3_600_000);
  assert.equal(state(id), "Running");
  kernel.set(flow({ state: "TIME_WAIT" }));
  await clock.pass(60_000);
  assert.equal(state(id), "Running");
  kernel.destroy(flow({ source_port: 5, source: "2001:db8::1", destination: "fd88::2" }));
  await clock.pass(9_000);
  assert.equal(state(id), "Running");
  await clock.pass(1_000);
  assert.equal(state(id), "Standby");
});

// H7: who is busy is not among those that go, whatever the others do.
test("of many instances the idle ones sleep, and those that serve a long request stay", async (t) => {
  const { instance, clock, kernel, state } = await world(t);
  const names = ["a", "b", "c", "d"];
  const made = await Promise.all(names.map((name) => instance(name)));
  const busy = made.filter((_, i) => i % 2 === 1);
  for (const { network } of busy) kernel.set(flow({ destination: network.ip! }));
  await clock.pass(3_600_000);
  for (const each of made) assert.equal(state(each.id), busy.includes(each) ? "Running" : "Standby", each.name);
});

// I19, I18: awake since counts whoever woke it.
test("an instance stays awake for min_awake after every wake", async (t) => {
  const { instance, clock, state, hypervisor } = await world(t, { table: { min_awake: "1m" } });
  const { id } = await instance("web", { enabled: true, idle_timeout: "1s" });
  for (const actor of ["api", "wake", "someone"]) {
    await clock.pass(59_000);
    assert.equal(state(id), "Running", actor);
    await clock.pass(1_000);
    assert.equal(state(id), "Standby", actor);
    await hypervisor.restore(id, { actor, cause: "request" });
  }
});

// I20: no sleep before the first ready.
test("an instance does not sleep before it is ready, and its idle clock starts there", async (t) => {
  const { instance, clock, state, driver, hypervisor } = await world(t);
  driver.ready = "Initializing";
  const { id } = await instance();
  await clock.pass(60_000);
  assert.equal(state(id), "Initializing");
  driver.machines.set(id, { state: "Running" });
  hypervisor.changed(id, "ready");
  await clock.pass(9_000);
  assert.equal(state(id), "Running");
  await clock.pass(1_000);
  assert.equal(state(id), "Standby");
});

// I14: what has nothing to do with use does not touch the idle clock.
test("an update of tags does not touch the idle clock", async (t) => {
  const { instance, clock, state, hypervisor } = await world(t);
  const { id } = await instance();
  for (let i = 0; i < 9; i++) {
    await clock.pass(1_000);
    await hypervisor.update(id, { tags: { i: String(i) } }, ORIGIN);
  }
  await clock.pass(1_000);
  assert.equal(state(id), "Standby");
});

test("a policy that changes holds from then on", async (t) => {
  const { instance, clock, state, hypervisor, kernel } = await world(t);
  const { id } = await instance();
  kernel.set(flow({ destination_port: 9100 }));
  await clock.pass(60_000);
  assert.equal(state(id), "Running");
  await hypervisor.update(id, { auto_standby: { ...POLICY, ignore_destination_ports: [9100] } }, ORIGIN);
  await clock.pass(10_000);
  assert.equal(state(id), "Standby");
  await hypervisor.restore(id, ORIGIN);
  kernel.destroy(flow({ destination_port: 9100 }));
  await hypervisor.update(id, { auto_standby: { enabled: false } }, ORIGIN);
  await clock.pass(60_000);
  assert.equal(state(id), "Running");
  await hypervisor.update(id, { auto_standby: POLICY }, ORIGIN);
  await clock.pass(9_000);
  assert.equal(state(id), "Running", "nobody looked while it was off");
  await clock.pass(1_000);
  assert.equal(state(id), "Standby");
  await hypervisor.restore(id, ORIGIN);
  await hypervisor.update(id, { auto_standby: null }, ORIGIN);
  await clock.pass(600_000);
  assert.equal(state(id), "Running");
  assert.equal(kernel.watched, 0);
});

// I6: the clock may step either way.
test("an instance sleeps in time when the clock steps back, and not for lack of a look when it steps forwards", async (t) => {
  const { instance, clock, state, kernel } = await world(t);
  const { id } = await instance();
  clock.step(-86_400_000);
  await clock.pass(10_000);
  assert.equal(state(id), "Running", "the countdown begins anew");
  await clock.pass(10_000);
  assert.equal(state(id), "Standby");
  const other = await instance("other");
  kernel.set(flow({ destination: "10.88.0.3" }));
  clock.step(86_400_000);
  await clock.pass(60_000);
  assert.equal(state(other.id), "Running");
});

// I26: trying again and again does not make a half-open flow young.
test("a half-open connection counts for half_open_max_age from when it was seen first", async (t) => {
  const { instance, clock, state, kernel } = await world(t, { table: { half_open_max_age: "60s" } });
  const { id } = await instance();
  for (let i = 0; i < 12; i++) {
    kernel.set(flow({ state: "SYN_SENT" }));
    await clock.pass(4_000);
  }
  assert.equal(state(id), "Running");
  await clock.pass(12_000 + 2_000);
  kernel.set(flow({ state: "SYN_SENT" }));
  await clock.pass(10_000);
  assert.equal(state(id), "Standby");
});

// I29: sleeping and waking again and again ends, and is told.
test("an instance that flaps is left awake for longer and longer", async (t) => {
  const table = { flap_cycles: 3, flap_window: "10m", flap_backoff: "1m", flap_backoff_max: "90s", min_awake: "0s" };
  const { instance, clock, state, hypervisor, flaps } = await world(t, { table });
  const { id } = await instance("web", { enabled: true, idle_timeout: "1s" });
  const wake = () => hypervisor.restore(id, { actor: "wake", cause: "knock" });
  for (let i = 0; i < 3; i++) {
    await clock.pass(1_000);
    assert.equal(state(id), "Standby", String(i));
    await wake();
  }
  await clock.pass(59_000);
  assert.equal(state(id), "Running");
  await clock.pass(1_000);
  assert.equal(state(id), "Standby");
  await wake();
  await clock.pass(89_000);
  assert.equal(state(id), "Running");
  assert.deepEqual(flaps.map(({ cycles, awake_for }) => [cycles, awake_for]), [[3, 60_000], [3, 90_000]]);
});

// S10, I13: a countdown and a hold go on after a restart of the host; I3 holds for it too.
test("a restart of the host goes on with the countdown, and connections that are there end it", async (t) => {
  const folder = temporaryFolder(t);
  const [clock, kernel] = [new ManualClock(), new ScriptedKernel()];
  const options = { folder, clock, kernel, table: { min_awake: "1s" } };
  const first = await world(t, options);
  const [quiet, busy] = [await first.instance("quiet"), await first.instance("busy")];
  await clock.pass(6_000);
  await first.host.close();
  assert.equal(clock.timers, 0);
  assert.equal(kernel.watched, 0);
  kernel.set(flow({ destination: "10.88.0.3" }));
  const second = await world(t, { ...options, driver: new ScriptedDriver(first.driver.machines) });
  await clock.pass(3_900);
  assert.equal(second.state(quiet.id), "Running");
  await clock.pass(200);
  assert.equal(second.state(quiet.id), "Standby");
  assert.equal(second.state(busy.id), "Running");
  await clock.pass(60_000);
  assert.equal(second.state(busy.id), "Running");
});

// I16: what the host itself opens to probe the instance is no use of it.
test("probes of the host do not keep an instance awake, and its other connections do", async (t) => {
  const { instance, clock, state, kernel } = await world(t);
  const { id } = await instance();
  kernel.set(flow({ source: "10.88.0.1", source_port: 64_001 }));
  kernel.set(flow({ source: "192.0.2.9", source_port: 64_001, protocol: "udp", state: "" }));
  await clock.pass(10_000);
  assert.equal(state(id), "Standby");
  const other = await instance("other");
  kernel.set(flow({ source: "10.88.0.1", source_port: 40_001, destination: "10.88.0.3" }));
  await clock.pass(60_000);
  assert.equal(state(other.id), "Running");
});

// What stands in the table for an address that is given out anew was somebody else's.
test("an instance sleeps although connections of the address's former holder are in the table", async (t) => {
  const { instance, clock, state, kernel, driver } = await world(t);
  kernel.set(flow());
  const slow = gate();
  driver.script.start = slow.script;
  const made = instance();
  await slow.arrived;
  await settle();
  slow.open();
  const { id } = await made;
  await clock.pass(10_000);
  assert.equal(state(id), "Standby");
});

// W21: sleeping without waking is told at the start.
test("setup warns when no plugin wakes what sleeps", async (t) => {
  const logs = capturedLogs(t);
  await world(t);
  assert.ok(logs.some((line) => line.includes("no plugin wakes them")));
});
