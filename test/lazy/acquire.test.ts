import assert from "node:assert/strict";
import { test } from "node:test";
import { definePlugin, type Plugin } from "../../main.ts";
import { settle } from "../clock.ts";
import { gate } from "../hypervisor/scripted.ts";
import { PERSON, world } from "./world.ts";

const count = (calls: readonly string[], call: string) => calls.filter((each) => each === call).length;

test("acquire() starts a stopped instance, and answers with a lease once it runs", async (t) => {
  const { stopped, acquire, state, shown, notes, clock, lazy } = await world(t);
  const { id } = await stopped();
  assert.deepEqual([state("web"), shown("web").lifecycle_state], ["Stopped", "stopped"]);
  const { lease, instance, expires_at, latency_ms, started } = await acquire("web", "2m");
  assert.match(lease, /^[a-z0-9]{20,}$/);
  assert.deepEqual([instance, started, state("web")], [id, true, "Running"]);
  assert.equal(Date.parse(expires_at), clock.now() + 120_000);
  assert.ok(latency_ms >= 0);
  assert.deepEqual([shown("web").lifecycle_state, lazy.stats().leases], ["running", 1]);
  await settle();
  const note = notes.at(-1)!;
  assert.deepEqual([note.type, note.event, note.actor, note.instance_id], [
    "lazy_start",
    "container.lazy_started",
    "lazy",
    id,
  ]);
  assert.deepEqual(Object.keys(note.detail).sort(), ["instance", "latency_ms"]);
  assert.equal(note.detail.instance, id);
});

test("acquire() of a running instance starts nothing and notes nothing", async (t) => {
  const { instance, acquire, driver, said, shown } = await world(t);
  await instance();
  assert.equal(shown("web").lifecycle_state, "idle");
  const [one, two] = [await acquire("web"), await acquire("web")];
  assert.notEqual(one.lease, two.lease);
  assert.deepEqual([one.started, two.started, shown("web").lifecycle_state], [false, false, "running"]);
  assert.equal(count(driver.calls, "start"), 1);
  assert.deepEqual(said(), []);
});

for (const via of ["stop", "standby"] as const) {
  test(`acquire() by fifty at once is one start, of an instance that is away by ${via}`, async (t) => {
    const { stopped, acquire, driver, said, shown, state } = await world(t);
    await stopped("web", { via });
    assert.equal(state("web"), via === "stop" ? "Stopped" : "Standby");
    const call = via === "stop" ? "start" : "restore";
    const { script, arrived, open } = gate();
    driver.script[call] = script;
    const before = count(driver.calls, call);
    const all = Array.from({ length: 50 }, () => acquire("web"));
    await arrived;
    assert.equal(shown("web").lifecycle_state, "starting");
    open();
    const leases = await Promise.all(all);
    assert.equal(new Set(leases.map(({ lease }) => lease)).size, 50);
    assert.ok(leases.every(({ started }) => started));
    assert.equal(count(driver.calls, call) - before, 1);
    await settle();
    assert.deepEqual(said(), ["lazy_stop", "lazy_start"]);
    assert.equal(shown("web").lifecycle_metrics.leases_granted, 50);
  });
}

// W3: who leaves ends the start for nobody else.
test("acquire() whose client leaves gives no lease, and the start goes on for the others", async (t) => {
  const { stopped, acquire, driver, lazy, state, clock, shown } = await world(t);
  await stopped();
  const { script, arrived, open } = gate();
  driver.script.start = script;
  const first = new AbortController();
  const left = acquire("web", undefined, first.signal);
  const stays = acquire("web");
  await arrived;
  first.abort(new Error("gone"));
  await assert.rejects(left, { message: "gone" });
  open();
  const { lease } = await stays;
  assert.equal(lazy.stats().leases, 1);
  assert.ok(lease);
  await clock.pass(60_000);
  await clock.pass(10_000);
  assert.deepEqual([state("web"), shown("web").lifecycle_metrics.leases_granted], ["Stopped", 1]);
});

test("a start whose clients have all left goes on, and the idle window begins at its end", async (t) => {
  const { stopped, acquire, driver, lazy, state, clock, said } = await world(t);
  await stopped();
  const { script, arrived, open } = gate();
  driver.script.start = script;
  const only = new AbortController();
  const left = acquire("web", undefined, only.signal);
  await arrived;
  only.abort(new Error("gone"));
  await assert.rejects(left, { message: "gone" });
  await clock.pass(15_000);
  open();
  await settle();
  assert.deepEqual([state("web"), lazy.stats().leases], ["Running", 0]);
  await clock.pass(9_999);
  assert.equal(state("web"), "Running");
  await clock.pass(1);
  assert.equal(state("web"), "Stopped");
  assert.deepEqual(said(), ["lazy_stop", "lazy_start", "lazy_stop"]);
});

// W20: the reason, and not a timeout.
test("acquire() tells all who wait why a start failed, and the next tries again", async (t) => {
  const { stopped, acquire, driver, notes, shown, lazy } = await world(t);
  const { id } = await stopped();
  driver.script.start = () => Promise.reject(new Error("no such disk"));
  const refused = { code: "driver_failed", message: 'Cannot start instance "web": no such disk' };
  await Promise.all([1, 2, 3].map(() => assert.rejects(acquire("web"), refused)));
  await settle();
  const failures = notes.filter(({ type }) => type === "lazy_start_failed");
  assert.deepEqual(failures.map(({ event, detail, actor }) => [event, detail, actor]), [[
    "container.lazy_start_failed",
    { instance: id, error: refused.message },
    "lazy",
  ]]);
  assert.deepEqual([shown("web").lifecycle_state, lazy.stats().states.failed], ["failed", 1]);
  delete driver.script.start;
  assert.equal((await acquire("web")).started, true);
  assert.equal(shown("web").lifecycle_state, "running");
});

test("acquire() ends with lazy_start_timeout, and the instance is left to become ready", async (t) => {
  const { stopped, acquire, driver, clock, state, said, shown } = await world(t);
  await stopped("web", { start_timeout: "3s" });
  const { script, arrived, open } = gate();
  driver.script.start = script;
  const late = acquire("web");
  await arrived;
  const refused = assert.rejects(late, {
    code: "lazy_start_timeout",
    message: 'Cannot acquire instance "web": it was not ready within 3s',
  });
  await clock.pass(3_000);
  await refused;
  assert.deepEqual([state("web"), shown("web").lifecycle_state], ["Created", "starting"]);
  const again = acquire("web");
  open();
  assert.equal((await again).started, true, "it joins the start of before");
  await settle();
  assert.deepEqual(said(), ["lazy_stop", "lazy_start_failed", "lazy_start"]);
});

test("acquire() waits until a driver that reports ready later does", async (t) => {
  const { stopped, acquire, driver, hypervisor, state } = await world(t);
  const { id } = await stopped();
  driver.ready = "Initializing";
  let done = false;
  const lease = acquire("web").finally(() => done = true);
  await settle();
  assert.deepEqual([state("web"), done], ["Initializing", false]);
  driver.machines.set(id, { state: "Running" });
  hypervisor.changed(id, "ready");
  assert.equal((await lease).started, true);
});

test("acquire() fails with the reason where the instance ends before it is ready", async (t) => {
  const { stopped, acquire, driver, hypervisor, said } = await world(t);
  const { id } = await stopped();
  driver.ready = "Initializing";
  const lease = acquire("web");
  const refused = assert.rejects(lease, {
    code: "lazy_start_failed",
    message: 'Cannot acquire instance "web": before it was ready its state became Stopped (no config)',
  });
  await settle();
  driver.machines.set(id, { state: "Stopped", exit_code: 1, exit_message: "no config" });
  hypervisor.changed(id, "exit");
  await refused;
  await settle();
  assert.deepEqual(said(), ["lazy_stop", "lazy_start_failed"]);
});

test("acquire() is ready once wake:ready passes, which is asked again with a growing pause", async (t) => {
  const asked: number[] = [];
  let healthy = false;
  const health = definePlugin({
    name: "checking",
    setup: (host) =>
      void host.hooks.guard("wake:ready", () => {
        asked.push(now());
        if (!healthy) throw new Error("not yet");
      }),
  });
  const { stopped, acquire, clock, shown } = await world(t, { plugins: [health as Plugin] });
  const now = clock.now;
  await stopped();
  const lease = acquire("web");
  await clock.pass(2_000);
  assert.equal(shown("web").lifecycle_state, "starting");
  const pauses = asked.slice(1).map((at, i) => at - asked[i]);
  assert.deepEqual(pauses, [25, 50, 100, 200, 400, 500, 500]);
  healthy = true;
  await clock.pass(500);
  assert.equal((await lease).started, true);

  // One that runs and is not healthy is waited for too, and that it is not so in time is no failed start.
  healthy = false;
  const refused = assert.rejects(acquire("web"), { code: "lazy_start_timeout" });
  await clock.pass(60_000);
  await refused;
  assert.deepEqual(shown("web").lifecycle_metrics.start_failures, 0);
});

// S2: nobody acts on what cannot be told.
test("acquire() of an instance in Unknown, or one that somebody has paused, is refused and does nothing", async (t) => {
  const { instance, acquire, driver, hypervisor, shown, said, clock } = await world(t);
  const { id } = await instance();
  driver.machines.set(id, { state: "Unknown" as never, error: "the socket is gone" } as never);
  driver.script.inspect = () => Promise.reject(new Error("the socket is gone"));
  hypervisor.changed(id, "lost");
  await settle();
  const before = driver.calls.length;
  await assert.rejects(acquire("web"), { code: "invalid_state", message: /Unknown \(the socket is gone\)/ });
  await clock.pass(100_000);
  assert.deepEqual([driver.calls.length - before, shown("web").lifecycle_state, said()], [0, "failed", []]);

  delete driver.script.inspect;
  driver.machines.set(id, { state: "Running" });
  hypervisor.changed(id, "found");
  await settle();
  await hypervisor.pause(id, PERSON);
  await assert.rejects(acquire("web"), { code: "invalid_state", message: /Paused/ });
  await clock.pass(100_000);
  assert.deepEqual([hypervisor.find(id)!.state, said()], ["Paused", []]);
});

test("acquire() is refused for an instance that is not lazy, is gone, or has all its leases", async (t) => {
  const { instance, acquire, release, hypervisor, clock } = await world(t, { table: { max_leases: 2, max_ttl: "1h" } });
  await instance("plain", { enabled: false });
  await assert.rejects(acquire("plain"), {
    code: "not_lazy",
    message: 'Cannot lease instance "plain": its field "lazy" does not say {"enabled": true}',
  });
  await assert.rejects(acquire("nobody"), { code: "not_found" });
  const { id } = await instance();
  await assert.rejects(acquire("web", "61m"), {
    code: "invalid_ttl",
    message: 'Wrong value of "ttl": expected at most 1h0m0s, found 1h1m0s',
  });
  const { lease } = await acquire("web", "1h");
  await acquire("web", "30s");
  await assert.rejects(acquire("web"), { code: "insufficient_resources" });
  await release("web", lease);
  await acquire("web", "1h");
  await clock.pass(30_000);
  await acquire("web", "1h");
  await assert.rejects(acquire("web"), { code: "insufficient_resources" });
  await hypervisor.delete(id, PERSON);
  await assert.rejects(acquire("web"), { code: "not_found" });
});

test("who waits for an instance that is deleted, or not lazy any more, is told so", async (t) => {
  const { stopped, acquire, driver, hypervisor } = await world(t);
  const { id } = await stopped();
  driver.ready = "Initializing";
  const one = assert.rejects(acquire("web"), { code: "not_found" });
  await settle();
  await hypervisor.delete(id, PERSON);
  await one;

  driver.ready = "Running";
  const { id: other } = await stopped("other");
  const { script, arrived, open } = gate();
  driver.script.start = script;
  const two = assert.rejects(acquire("other"), { code: "not_lazy" });
  await arrived;
  const updated = hypervisor.update(other, { lazy: null }, PERSON);
  open();
  await Promise.all([two, updated]);
});

test("a stop that somebody asks for while an acquire starts the instance ends the start", async (t) => {
  const { stopped, acquire, driver, hypervisor, state, said } = await world(t);
  const { id } = await stopped();
  const { script, arrived } = gate();
  driver.script.start = script;
  const refused = assert.rejects(acquire("web"), { code: "aborted" });
  await arrived;
  await hypervisor.stop(id, PERSON);
  await refused;
  await settle();
  assert.deepEqual([state("web"), said()], ["Stopped", ["lazy_stop", "lazy_start_failed"]]);
});

test("a host that closes tells who waits, and waits for nobody", async (t) => {
  const { stopped, acquire, driver, host } = await world(t);
  await stopped();
  const { script, arrived, open } = gate();
  driver.script.start = script;
  const refused = assert.rejects(acquire("web"), { code: "shutting_down" });
  await arrived;
  const closed = host.close();
  await refused;
  open();
  await closed;
});
