import assert from "node:assert/strict";
import { test } from "node:test";
import { definePlugin, type Plugin } from "../../main.ts";
import { settle } from "../clock.ts";
import { temporaryFolder } from "../helpers.ts";
import { gate, ScriptedDriver } from "../hypervisor/scripted.ts";
import { killed, PERSON, world } from "./world.ts";

const STANDBY = { actor: "auto-standby", cause: "idle" };

// I23: one that nobody has ever acquired.
for (const [via, to] of [["stop", "Stopped"], ["standby", "Standby"]] as const) {
  test(`an instance without a lease is put away by ${via} when its idle window is over`, async (t) => {
    const { instance, clock, state, notes, events, shown } = await world(t);
    const { id } = await instance("web", { enabled: true, idle_stop: "10s", via });
    await clock.pass(9_999);
    assert.deepEqual([state("web"), shown("web").lifecycle_state], ["Running", "idle"]);
    await clock.pass(1);
    assert.deepEqual([state("web"), shown("web").lifecycle_state], [to, "stopped"]);
    assert.deepEqual([events.at(-1)!.action, events.at(-1)!.actor], [via, "lazy"]);
    assert.deepEqual(notes.map(({ type, event, detail, actor }) => ({ type, event, detail, actor })), [{
      type: "lazy_stop",
      event: "container.lazy_stopped",
      detail: { instance: id, idle_seconds: 10 },
      actor: "lazy",
    }]);
  });
}

// I24: work that outlives its request.
test("a lease keeps it running for as long as it is renewed; the idle window begins with its end", async (t) => {
  const { instance, clock, state, acquire, renew, release } = await world(t);
  await instance();
  const { lease } = await acquire("web", "30s");
  for (let n = 0; n < 10; n++) {
    await clock.pass(29_000);
    await renew("web", lease);
  }
  assert.equal(Date.parse((await renew("web", lease, "1h")).expires_at), clock.now() + 3_600_000);
  await clock.pass(3_599_000);
  assert.equal(state("web"), "Running");
  await clock.pass(1_000 + 9_999);
  assert.equal(state("web"), "Running");
  await clock.pass(1);
  assert.equal(state("web"), "Stopped");
  await assert.rejects(renew("web", lease), { code: "lease_not_found" });

  const one = await acquire("web", "1h");
  const two = await acquire("web", "1h");
  await clock.pass(60_000);
  await release("web", one.lease);
  await clock.pass(60_000);
  assert.equal(state("web"), "Running", "the other is held");
  await release("web", two.lease);
  await assert.rejects(release("web", two.lease), { code: "lease_not_found" });
  await clock.pass(9_999);
  assert.equal(state("web"), "Running");
  await clock.pass(1);
  assert.equal(state("web"), "Stopped");
});

// I23, and the wakes of others.
test("one that somebody else has started or woken runs for an idle window too", async (t) => {
  const { stopped, clock, state, hypervisor } = await world(t);
  const { id } = await stopped();
  await hypervisor.start(id, PERSON);
  await clock.pass(9_999);
  assert.equal(state("web"), "Running");
  await clock.pass(1);
  assert.equal(state("web"), "Stopped");
  await hypervisor.start(id, PERSON);
  await hypervisor.standby(id, STANDBY);
  await clock.pass(100_000);
  assert.equal(state("web"), "Standby", "it sleeps, which is as good");
  await hypervisor.restore(id, { actor: "wake", cause: "port" });
  await clock.pass(10_000);
  assert.equal(state("web"), "Stopped");
});

test("only what runs is counted: a pause stops the window, and it begins anew", async (t) => {
  const { instance, clock, state, hypervisor } = await world(t);
  const { id } = await instance();
  await clock.pass(9_000);
  await hypervisor.pause(id, PERSON);
  await clock.pass(60_000);
  assert.equal(state("web"), "Paused");
  await hypervisor.resume(id, PERSON);
  await clock.pass(9_999);
  assert.equal(state("web"), "Running");
  await clock.pass(1);
  assert.equal(state("web"), "Stopped");
});

// I6: a timer that rings is no proof.
test("a clock that steps back begins the window and the leases anew, and neither lasts longer than its time", async (t) => {
  const { instance, clock, state, acquire } = await world(t);
  await instance();
  clock.step(-3_600_000);
  await clock.pass(10_000);
  assert.equal(state("web"), "Running");
  await clock.pass(10_000);
  assert.equal(state("web"), "Stopped");
  await acquire("web", "30s");
  clock.step(-3_600_000);
  await clock.pass(30_000);
  assert.equal(state("web"), "Running");
  await clock.pass(40_000);
  assert.equal(state("web"), "Stopped");
});

test("a held lease vetoes a standby by itself, and a person's standby or stop ends the leases", async (t) => {
  const { instance, acquire, renew, release, hypervisor, state, lazy } = await world(t);
  const { id } = await instance();
  await hypervisor.standby(id, STANDBY);
  await hypervisor.restore(id, PERSON);
  const { lease } = await acquire("web");
  await assert.rejects(hypervisor.standby(id, STANDBY), {
    code: "vetoed",
    details: { plugin: "lazy", code: "lease_held", reason: 'instance "web" is needed: a lease is held' },
  });
  assert.equal(state("web"), "Running");
  await hypervisor.standby(id, { actor: "api:ops", cause: "request" });
  assert.equal(lazy.stats().leases, 0);
  await assert.rejects(renew("web", lease), { code: "lease_not_found" });
  await assert.rejects(release("web", lease), { code: "lease_not_found" });

  const second = await acquire("web");
  await hypervisor.stop(id, PERSON);
  await assert.rejects(renew("web", second.lease), { code: "lease_not_found" });
  assert.equal(state("web"), "Stopped");
  const third = await acquire("web");
  assert.equal(third.started, true);
  // A restart is for its own sake, and who works with the instance goes on.
  await hypervisor.stop(id, { actor: "restart", cause: "unhealthy" });
  await hypervisor.start(id, { actor: "restart", cause: "unhealthy" });
  await renew("web", third.lease);
});

test("a standby by itself is vetoed while somebody waits for the instance", async (t) => {
  let healthy = false;
  const health = definePlugin({
    name: "checking",
    setup: (host) =>
      void host.hooks.guard("wake:ready", () => {
        if (!healthy) throw new Error("not yet");
      }),
  });
  const { instance, acquire, hypervisor, clock } = await world(t, { plugins: [health as Plugin] });
  const { id } = await instance();
  const lease = acquire("web");
  await settle();
  await assert.rejects(hypervisor.standby(id, STANDBY), {
    code: "vetoed",
    details: { plugin: "lazy", code: "lease_held", reason: 'instance "web" is needed: an acquire waits for it' },
  });
  healthy = true;
  await clock.pass(1_000);
  await lease;
});

test("a crash leaves the leases, for who restarts it", async (t) => {
  const { instance, acquire, renew, hypervisor, driver, state, shown, clock } = await world(t);
  const { id } = await instance();
  const { lease } = await acquire("web");
  driver.machines.set(id, { state: "Stopped", exit_code: 1, exit_message: "crashed" });
  hypervisor.changed(id, "exit");
  await settle();
  assert.deepEqual([state("web"), shown("web").lifecycle_state], ["Stopped", "stopped"]);
  await hypervisor.start(id, { actor: "restart", cause: "exited" });
  await renew("web", lease);
  await clock.pass(59_000);
  assert.equal(state("web"), "Running");
});

test("a stop that fails, or that a guard is against, is noted and tried again less and less often", async (t) => {
  let tries: number[] = [];
  const against = definePlugin({
    name: "against",
    setup(host) {
      host.hooks.guard("before:stop", ({ origin }) => {
        if (origin.actor !== "lazy") return;
        tries.push(now());
        throw host.veto("busy", "it is being backed up");
      });
    },
  });
  const { instance, clock, notes, shown, acquire, release, state } = await world(t, { plugins: [against as Plugin] });
  const now = clock.now;
  const { id } = await instance();
  await clock.pass(10_000 + 75_000);
  assert.deepEqual(tries.slice(1).map((at, i) => at - tries[i]), [10_000, 20_000, 40_000]);
  assert.deepEqual(notes.map(({ type }) => type), Array(4).fill("lazy_stop_failed"));
  assert.deepEqual([notes[0].event, notes[0].detail], ["container.lazy_stop_failed", {
    instance: id,
    error: 'Refused by plugin "against": it is being backed up',
  }]);
  const { lifecycle_state, lifecycle_metrics } = shown("web");
  assert.deepEqual([lifecycle_state, lifecycle_metrics.stop_failures], ["idle", 4]);

  // A lease in between changes nothing about that.
  const { lease } = await acquire("web");
  await release("web", lease);
  tries = [];
  await clock.pass(20_000);
  assert.deepEqual([tries, state("web")], [[], "Running"]);
});

test("at most max_concurrent are stopped at the same time", async (t) => {
  const { instance, clock, driver, lazy, hypervisor } = await world(t, { table: { max_concurrent: 2 } });
  for (const name of ["a", "b", "c", "d", "e"]) await instance(name);
  const gates = ["a", "b", "c", "d", "e"].map(gate);
  let stops = 0;
  driver.script.stop = (made, signal) => gates[stops++].script(made, signal);
  await clock.pass(10_000);
  assert.deepEqual([stops, lazy.stats().states.stopping], [2, 2]);
  gates[1].open();
  await settle();
  assert.equal(stops, 3);
  for (const { open } of gates) open();
  await settle(10);
  assert.deepEqual(hypervisor.list().map(({ state }) => state), Array(5).fill("Stopped"));
});

// S10: the countdown and the leases outlive the host.
test("leases and the idle window go on over a restart of the host, and end while there is none", async (t) => {
  const folder = temporaryFolder(t);
  const machines = new ScriptedDriver().machines;
  const first = await world(t, { folder, driver: new ScriptedDriver(machines) });
  for (const name of ["leased", "counting", "ended"]) await first.instance(name);
  const { lease } = await first.acquire("leased", "1m");
  const short = await first.acquire("ended", "5s");
  await first.clock.pass(4_000);
  await first.host.close();

  first.clock.step(2_000); // the lease of `ended` is over since one second, when nobody was there
  const { clock, state, renew, lazy } = await world(t, {
    folder,
    driver: new ScriptedDriver(machines),
    clock: first.clock,
  });
  assert.equal(lazy.stats().leases, 1);
  await assert.rejects(renew("ended", short.lease), { code: "lease_not_found" });
  await clock.pass(3_999);
  assert.equal(state("counting"), "Running");
  await clock.pass(1);
  assert.deepEqual([state("counting"), state("leased"), state("ended")], ["Stopped", "Running", "Running"]);
  await clock.pass(4_999);
  assert.equal(state("ended"), "Running");
  await clock.pass(1);
  assert.equal(state("ended"), "Stopped");
  await renew("leased", lease);
  await clock.pass(59_000);
  assert.equal(state("leased"), "Running");
});

test("a host that was away for long stops at once what nobody needs since", async (t) => {
  const folder = temporaryFolder(t);
  const machines = new ScriptedDriver().machines;
  const first = await world(t, { folder, driver: new ScriptedDriver(machines) });
  await first.instance();
  await first.acquire("web", "30s");
  const left = killed(t, folder);
  first.clock.step(3_600_000);
  const second = await world(t, { folder: left, driver: new ScriptedDriver(machines), clock: first.clock });
  await settle();
  assert.equal(second.state("web"), "Stopped");
  assert.equal(second.notes[0].detail.idle_seconds, 3_570);
});

test("a host that dies between a stop and the note of it notes it at its next start, once", async (t) => {
  const folder = temporaryFolder(t);
  const driver = new ScriptedDriver();
  const left: string[] = [];
  const dying = definePlugin({
    name: "dying",
    setup(host) {
      host.hooks.on("instance:event", ({ action, actor }) => {
        if (action === "stop" && actor === "lazy") left.push(killed(t, folder));
      });
    },
  });
  const first = await world(t, { folder, driver, plugins: [dying as Plugin] });
  await first.instance();
  await first.clock.pass(10_000);
  assert.deepEqual([left.length, first.said()], [1, ["lazy_stop"]]);
  for (const expected of [["lazy_stop"], []]) {
    const next = await world(t, { folder: left[0], driver, clock: first.clock });
    await settle();
    assert.deepEqual([next.said(), next.state("web")], [expected, "Stopped"]);
    assert.equal(next.shown("web").lifecycle_metrics.stops, 1);
    await next.host.close();
  }
});

test("an update of the policy counts from where the window began", async (t) => {
  const { instance, clock, state, hypervisor } = await world(t);
  const { id } = await instance("web", { enabled: true, idle_stop: "1h" });
  await clock.pass(60_000);
  await hypervisor.update(id, { lazy: { enabled: true, idle_stop: "90s" } }, PERSON);
  await clock.pass(29_999);
  assert.equal(state("web"), "Running");
  await clock.pass(1);
  assert.equal(state("web"), "Stopped");
});
