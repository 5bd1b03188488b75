import assert from "node:assert/strict";
import { mkdirSync } from "node:fs";
import { join } from "node:path";
import { describe, it } from "node:test";
import type { ExecRequest, Instance, Plugin, PluginHooks } from "../../main.ts";
import { systemClock } from "../../plugins/shared/clock.ts";
import { ManualClock, settle } from "../clock.ts";
import { capturedLogs, temporaryFolder, until } from "../helpers.ts";
import { ORIGIN, registryHost, ScriptedDriver } from "../hypervisor/scripted.ts";
import { ExaminedDriver, world } from "./world.ts";

/** An answer that comes when the test says so. */
function held() {
  const calls: { instance: Instance; request: ExecRequest; end: (exit_code: number) => void }[] = [];
  const answer = (instance: Instance, request: ExecRequest) =>
    new Promise<number>((resolve, reject) => {
      request.signal!.addEventListener("abort", () => reject(request.signal!.reason));
      calls.push({ instance, request, end: resolve });
    });
  return { calls, answer };
}

/** A command that heeds no signal, as a probe whose result is on its way already. */
function deaf() {
  const ends: ((exit_code: number) => void)[] = [];
  const answer = () => new Promise<number>((resolve) => void ends.push(resolve));
  return { ends, answer };
}

describe("a probe", () => {
  it("comes at once, and then an interval after the end of the one before it", async (t) => {
    const { clock, driver, make, status } = await world(t);
    const { calls, answer } = held();
    driver.answer = answer;
    const { id } = await make();
    await clock.pass(0);
    assert.equal(calls.length, 1);
    await clock.pass(1_500);
    calls[0].end(0);
    await clock.pass(9_999);
    assert.equal(calls.length, 1);
    assert.equal(status(id).last_checked_at, new Date(clock.now() - 9_999).toISOString());
    await clock.pass(1);
    assert.equal(calls.length, 2);
  });

  it("is the first one some time later, by chance, but within a second", async (t) => {
    const { clock, driver, make } = await world(t, { random: () => 0.4 });
    await make();
    await clock.pass(399);
    assert.equal(driver.execs.length, 0);
    await clock.pass(1);
    assert.equal(driver.execs.length, 1);
  });

  it("fails at its timeout, even where the driver does not heed it", async (t) => {
    for (const answer of [held().answer, deaf().answer]) {
      const { clock, driver, make, status } = await world(t);
      driver.answer = answer;
      const { id } = await make("web", { failure_threshold: 2 });
      await clock.pass(1_999);
      assert.equal(status(id).consecutive_failures, 0);
      await clock.pass(1);
      const { consecutive_failures, last_error } = status(id);
      assert.deepEqual([consecutive_failures, last_error], [1, "No answer within 2s"]);
      await clock.pass(12_000);
      assert.equal(status(id).status, "unhealthy");
    }
  });

  it("tells why it failed", async (t) => {
    const { clock, driver, make, status } = await world(t);
    driver.answer = () => 3;
    const { id } = await make();
    await clock.pass(0);
    assert.equal(status(id).last_error, "Exit code is 3: broken");
    driver.answer = () => Promise.reject(new Error("€".repeat(200)));
    await clock.pass(10_000);
    assert.equal(status(id).last_error, "€".repeat(170));
    driver.answer = () => 0;
    await clock.pass(10_000);
    assert.equal(status(id).last_error, null);
  });

  it("is told of, with its kind and how it went", async (t) => {
    const { clock, driver, make, probed } = await world(t);
    const { id } = await make();
    await clock.pass(0);
    driver.answer = () => 1;
    await clock.pass(10_000);
    assert.deepEqual(probed.map(({ instance_id, type, ok }) => [instance_id, type, ok]), [
      [id, "exec", true],
      [id, "exec", false],
    ]);
  });
});

describe("the status", () => {
  it("changes with the probes, each change a note and an event", async (t) => {
    const { clock, driver, make, said, notes, changes, status, health, hypervisor } = await world(t);
    const { id } = await make();
    await clock.pass(0);
    driver.answer = () => 1;
    await clock.pass(29_999);
    assert.deepEqual([status(id).status, status(id).consecutive_failures], ["healthy", 2]);
    await clock.pass(1);
    driver.answer = () => 0;
    await clock.pass(10_000);
    assert.equal(health.stateOf(hypervisor.find(id)!), "healthy");
    assert.deepEqual(said(), ["unknown starting", "starting healthy", "healthy unhealthy", "unhealthy healthy"]);
    assert.equal(changes[2].error, "Exit code is 1: broken");
    const { type, actor, cause, summary, detail } = notes[2];
    assert.deepEqual([type, actor, cause], ["health:changed", "health", "probe"]);
    assert.equal(summary, 'Health of "web" is unhealthy: Exit code is 1: broken');
    assert.deepEqual(detail, { from: "healthy", to: "unhealthy", error: "Exit code is 1: broken" });
    assert.equal(notes.length, 4);
  });

  it("is starting for as long as the instance is, though it is probed", async (t) => {
    const { clock, driver, hypervisor, event, make, status, said } = await world(t);
    driver.ready = "Initializing";
    const { id } = await make();
    await clock.pass(10_000);
    const { status: shown, consecutive_successes } = status(id);
    assert.deepEqual([shown, consecutive_successes], ["starting", 2]);
    driver.machines.set(id, { state: "Running" });
    hypervisor.changed(id, "ready");
    await event(({ to }) => to === "Running");
    await settle();
    assert.equal(status(id).status, "healthy");
    assert.deepEqual(said(), ["unknown starting", "starting healthy"]);
  });

  it("is disabled without a check, and told of when the check goes", async (t) => {
    const { clock, driver, hypervisor, make, said, status } = await world(t);
    const { id } = await make();
    await clock.pass(0);
    await hypervisor.update(id, { health_check: null }, ORIGIN);
    await clock.pass(60_000);
    assert.equal(driver.execs.length, 1);
    const none = { last_checked_at: null, last_success_at: null, last_failure_at: null, last_error: null };
    assert.deepEqual(status(id), { status: "disabled", consecutive_successes: 0, consecutive_failures: 0, ...none });
    await hypervisor.update(id, { health_check: { exec: { command: ["check"] } } }, ORIGIN);
    await clock.pass(0);
    assert.deepEqual(said().slice(2), ["healthy disabled", "disabled starting", "starting healthy"]);
    assert.equal(clock.timers, 2, "the next probe, and the write of its counts");
  });

  // H6: what becomes of it is for others to decide.
  it("changes no state of the instance, however unhealthy", async (t) => {
    const { clock, driver, hypervisor, events, make, status } = await world(t);
    driver.answer = () => 1;
    const { id } = await make();
    await clock.pass(3_600_000);
    assert.equal(status(id).status, "unhealthy");
    assert.deepEqual([hypervisor.find(id)!.state, events.map(({ action }) => action)], ["Running", [
      "create",
      "start",
    ]]);
  });

  it("stays as it was where it cannot be written, and is told of once that works", async (t) => {
    const logs = capturedLogs(t);
    let full = false;
    const disk: Plugin = {
      name: "disk",
      requires: ["hypervisor"],
      setup: ({ hooks }) =>
        void hooks.commit("note:commit", () => {
          if (full) throw new Error("disk full");
        }),
    };
    const { clock, driver, make, said, host } = await world(t, { plugins: [disk] });
    const { id } = await make();
    await clock.pass(0);
    const kept = () =>
      JSON.parse(
        host.use("store").db.prepare("SELECT body FROM runtimes WHERE instance_id = ?").get(id)!.body as string,
      );
    driver.answer = () => 1;
    full = true;
    await clock.pass(30_000);
    assert.deepEqual([said().length, kept().told], [2, "healthy"]);
    assert.ok(logs.some((line) => line.includes("disk full")));
    full = false;
    await clock.pass(10_000);
    assert.deepEqual([said().at(-1), kept().told, kept().window.failures], ["healthy unhealthy", "unhealthy", 3]);
  });
});

describe("a window", () => {
  // H1: what was asked before says nothing about after.
  it("is not touched by a result of the one before it", async (t) => {
    for (const again of ["restart", "policy", "sleep"]) {
      const { clock, driver, hypervisor, make, status, probed } = await world(t);
      const { ends, answer } = deaf();
      driver.answer = answer;
      const { id } = await make();
      await clock.pass(0);
      if (again === "restart") {
        await hypervisor.stop(id, ORIGIN);
        await hypervisor.start(id, ORIGIN);
      } else if (again === "sleep") {
        await hypervisor.standby(id, ORIGIN);
        await hypervisor.restore(id, ORIGIN);
      } else {
        await hypervisor.update(id, { health_check: { exec: { command: ["other"] }, start_period: "0s" } }, ORIGIN);
      }
      await clock.pass(0);
      assert.equal(ends.length, 2, again);
      ends[0](1);
      await clock.pass(0);
      assert.deepEqual([status(id).last_checked_at, probed.length], [null, 0], again);
      ends[1](0);
      await clock.pass(0);
      assert.deepEqual([status(id).status, status(id).consecutive_failures], ["healthy", 0], again);
      await clock.pass(10_000);
      assert.equal(ends.length, 3, "the next one is due as ever");
    }
  });

  it("begins anew with a start, a restore and another check, and with nothing else", async (t) => {
    const { clock, hypervisor, make, status } = await world(t);
    const { id } = await make();
    const successes = async () => {
      await clock.pass(0);
      return status(id).consecutive_successes;
    };
    await clock.pass(10_000);
    assert.equal(await successes(), 2);
    await hypervisor.update(id, { tags: { team: "a" } }, ORIGIN);
    const same = { exec: { command: ["check"] }, start_period: "0s", interval: "10000ms" };
    await hypervisor.update(id, { health_check: same }, ORIGIN);
    assert.equal(await successes(), 2, "the same, in other words");
    await hypervisor.pause(id, ORIGIN);
    await hypervisor.resume(id, ORIGIN);
    assert.equal(await successes(), 2, "a pause is no new run");
    await hypervisor.stop(id, ORIGIN);
    assert.equal(await successes(), 2, "what it was at the end stays to be seen");
    await hypervisor.start(id, ORIGIN);
    assert.equal(await successes(), 1);
    await clock.pass(10_000);
    await hypervisor.standby(id, ORIGIN);
    await hypervisor.restore(id, ORIGIN);
    assert.equal(await successes(), 1);
    await clock.pass(10_000);
    await hypervisor.update(id, { health_check: { ...same, success_threshold: 2 } }, ORIGIN);
    assert.deepEqual([await successes(), status(id).status], [1, "starting"]);
  });

  it("goes on where a change of its instance was not written", async (t) => {
    let full = false;
    const disk: Plugin = {
      name: "disk",
      requires: ["hypervisor"],
      setup: ({ hooks }) =>
        void hooks.commit("instance:commit", () => {
          if (full) throw new Error("disk full");
        }, { priority: -1 }),
    };
    const { clock, driver, hypervisor, make, status } = await world(t, { plugins: [disk] });
    const { id } = await make();
    await clock.pass(0);
    full = true;
    await assert.rejects(hypervisor.stop(id, ORIGIN), /disk full/);
    await assert.rejects(hypervisor.update(id, { health_check: null }, ORIGIN), /disk full/);
    await clock.pass(10_000);
    assert.deepEqual([status(id).status, status(id).consecutive_successes], ["healthy", 2]);
    assert.equal(driver.execs.length, 2);
  });
});

// I16: nobody is asked anything who sleeps or is on the way there.
describe("an instance that does not run", () => {
  it("is not probed, and a probe that is under way is let go", async (t) => {
    const { clock, driver, hypervisor, make, said, status, health } = await world(t);
    const { calls, answer } = held();
    driver.answer = answer;
    const { id } = await make();
    const leave = { pause: "resume", standby: "restore", stop: "start" } as const;
    for (const [away, back] of Object.entries(leave) as ["pause", "resume"][]) {
      await clock.pass(0);
      const { request } = calls.at(-1)!;
      assert.equal(request.signal!.aborted, false);
      await hypervisor[away](id, ORIGIN);
      await settle();
      assert.ok(request.signal!.aborted, away);
      assert.deepEqual(health.stats(), { running: 0, waiting: 0 });
      const asked = calls.length;
      await clock.pass(60_000);
      assert.deepEqual([calls.length, status(id).status, status(id).last_error], [asked, "unknown", null], away);
      await hypervisor[back](id, ORIGIN);
      await clock.pass(0);
      assert.equal(calls.length, asked + 1, back);
    }
    assert.ok(!said().some((change) => change.includes("healthy")));
    await hypervisor.delete(id, ORIGIN);
    await clock.pass(60_000);
    assert.deepEqual([health.stats(), clock.timers], [{ running: 0, waiting: 0 }, 0]);
  });

  it("is not probed from the moment that its way is written down", async (t) => {
    const { clock, driver, hypervisor, make } = await world(t);
    const { id } = await make();
    await clock.pass(0);
    const arrived = Promise.withResolvers<void>();
    const passage = Promise.withResolvers<void>();
    driver.script.standby = async () => {
      arrived.resolve();
      await passage.promise;
    };
    const asleep = hypervisor.standby(id, ORIGIN);
    await arrived.promise;
    const asked = driver.execs.length;
    await clock.pass(60_000);
    assert.equal(driver.execs.length, asked);
    passage.resolve();
    await asleep;
  });
});

describe("a restart of the host", () => {
  // S10: the next host goes on with what is known.
  it("keeps the status, the counts and the time of the next probe", async (t) => {
    const [folder, clock] = [temporaryFolder(t), new ManualClock()];
    const first = await world(t, { folder, clock });
    const { id } = await first.make();
    await clock.pass(14_000);
    const before = first.status(id);
    assert.deepEqual([before.status, before.consecutive_successes], ["healthy", 2]);
    await first.host.close();
    await clock.pass(3_000);

    const driver = new ExaminedDriver(first.driver.machines);
    const second = await world(t, { folder, clock, driver });
    await settle();
    assert.deepEqual(second.status(id), before);
    await clock.pass(2_999);
    assert.equal(driver.execs.length, 0);
    await clock.pass(1);
    assert.deepEqual([driver.execs.length, second.status(id).consecutive_successes], [1, 3]);
    assert.deepEqual(second.said(), []);
  });

  it("probes soon what was due meanwhile, and knows what has ended", async (t) => {
    const [folder, clock] = [temporaryFolder(t), new ManualClock()];
    const first = await world(t, { folder, clock });
    const [web, db] = [await first.make("web"), await first.make("db")];
    await clock.pass(5_000);
    await first.host.close();
    await clock.pass(60_000);
    first.driver.machines.set(db.id, { state: "Stopped", exit_code: 1, exit_message: "crashed" });
    const driver = new ExaminedDriver(first.driver.machines);
    const second = await world(t, { folder, clock, driver, random: () => 0.5 });
    await settle();
    assert.deepEqual(second.said(), ["healthy unknown"]);
    assert.equal(second.changes[0].instance_id, db.id);
    await clock.pass(500);
    assert.deepEqual([driver.execs, second.status(web.id).consecutive_successes], [["web"], 2]);
    await second.hypervisor.start(db.id, ORIGIN);
    await clock.pass(500);
    assert.equal(second.status(db.id).consecutive_successes, 1);
  });

  // S9, S10: what is on disk at any moment is a status that was told of, with counts that are some seconds old.
  it("after a crash has lost some counts and no status", async (t) => {
    const [folder, copy, clock] = [temporaryFolder(t), temporaryFolder(t), new ManualClock()];
    const first = await world(t, { folder, clock });
    const { id } = await first.make();
    await clock.pass(20_000);
    first.driver.answer = () => 1;
    await clock.pass(30_000);
    mkdirSync(join(copy, "data"));
    first.host.use("store").db.exec(`VACUUM INTO '${join(copy, "data", "dormouse.db")}'`);
    await clock.pass(20_000);
    assert.deepEqual([first.status(id).status, first.status(id).consecutive_failures], ["unhealthy", 5]);

    const driver = new ExaminedDriver(first.driver.machines);
    const second = await world(t, { folder: copy, clock, driver, random: () => 1 });
    await settle();
    assert.deepEqual([second.status(id).status, second.status(id).consecutive_failures], ["unhealthy", 3]);
    await clock.pass(1_000);
    assert.deepEqual(second.said(), ["unhealthy healthy"]);
  });

  // A stop whose event nobody came to handle any more.
  it("knows that a run has ended though nothing but its row says so", async (t) => {
    const [folder, copy, clock] = [temporaryFolder(t), temporaryFolder(t), new ManualClock()];
    const snapshot: Plugin = {
      name: "snapshot",
      requires: ["hypervisor", "store"],
      setup(host) {
        host.hooks.on("instance:event", ({ to }) => {
          if (to === "Standby") host.use("store").db.exec(`VACUUM INTO '${join(copy, "data", "dormouse.db")}'`);
        });
      },
    };
    mkdirSync(join(copy, "data"));
    // Before the plugin, so that it sees the event first.
    const first = await world(t, { folder, clock, plugins: [snapshot] });
    const { id } = await first.make();
    await clock.pass(10_000);
    await first.hypervisor.standby(id, ORIGIN);
    await settle();
    first.driver.machines.set(id, { state: "Running" });
    const second = await world(t, { folder: copy, clock, driver: new ExaminedDriver(first.driver.machines) });
    await settle();
    assert.equal(second.hypervisor.find(id)!.state, "Running");
    assert.deepEqual(second.said(), ["unknown starting"]);
    await clock.pass(0);
    assert.equal(second.status(id).consecutive_successes, 1);
  });

  it("begins anew what was started while the plugin was off", async (t) => {
    const [folder, machines] = [temporaryFolder(t), new Map()];
    // By the real clock, as the registry's own times are.
    const first = await world(t, { folder, clock: systemClock, driver: new ExaminedDriver(machines) });
    const probed = first.probe();
    const { id } = await first.make();
    await probed;
    await first.host.close();
    const off = await registryHost(t, { folder, driver: new ScriptedDriver(machines) });
    await off.hypervisor.stop(id, ORIGIN);
    await until("the clock has moved on", () => Date.now() > off.hypervisor.find(id)!.stopped_at!);
    await off.hypervisor.start(id, ORIGIN);
    await off.host.close();
    const driver = new ExaminedDriver(machines);
    driver.answer = held().answer;
    const second = await world(t, { folder, clock: systemClock, driver });
    assert.deepEqual([second.status(id).status, second.status(id).consecutive_successes], ["starting", 0]);
  });
});

describe("what waits for a wake", () => {
  const ask = (host: { hooks: PluginHooks }, instance: Instance, signal = new AbortController().signal) =>
    host.hooks.ask("wake:ready", { instance, signal });

  it("goes on at once where the instance is healthy, has no check, or is off", async (t) => {
    const { clock, driver, hypervisor, host, make } = await world(t);
    const instance = await make();
    await clock.pass(0);
    await ask(host, instance);
    for (const health_check of [{ type: "none" }, null]) {
      await ask(host, await hypervisor.update(instance.id, { health_check }, ORIGIN));
    }
    assert.equal(driver.execs.length, 1);
  });

  it("has it probed at once, and is told whether that went well", async (t) => {
    const { clock, driver, hypervisor, host, make, status } = await world(t, { random: () => 1 });
    const instance = await make("web", { interval: "1h" });
    driver.answer = () => 1;
    await assert.rejects(ask(host, instance), /not healthy: Exit code is 1/);
    driver.answer = () => 0;
    await ask(host, instance);
    assert.deepEqual([driver.execs.length, clock.timers], [2, 2], "the time of the next probe is set anew");
    await hypervisor.standby(instance.id, ORIGIN);
    await assert.rejects(ask(host, instance), /not healthy/);
    await ask(host, await hypervisor.restore(instance.id, ORIGIN));
    assert.deepEqual([driver.execs.length, status(instance.id).consecutive_successes], [3, 1]);
    await hypervisor.delete(instance.id, ORIGIN);
    await ask(host, instance);
  });

  it("joins a probe that is under way, and leaves when nobody waits any more", async (t) => {
    const { clock, driver, hypervisor, host, make } = await world(t);
    const { calls, answer } = held();
    driver.answer = answer;
    const instance = await make();
    await clock.pass(0);
    const left = new AbortController();
    const [one, other, gone] = [ask(host, instance), ask(host, instance), ask(host, instance, left.signal)];
    left.abort(new Error("nobody"));
    await assert.rejects(gone, /nobody/);
    calls[0].end(0);
    await Promise.all([one, other]);
    assert.equal(calls.length, 1);
    await hypervisor.stop(instance.id, ORIGIN);
    const late = assert.rejects(ask(host, await hypervisor.start(instance.id, ORIGIN)), /not healthy/);
    await settle();
    assert.equal(calls.length, 2);
    await hypervisor.stop(instance.id, ORIGIN);
    await late;
  });
});
