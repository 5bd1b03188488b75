import assert from "node:assert/strict";
import { test } from "node:test";
import { DormouseError } from "../../main.ts";
import { settle } from "../clock.ts";
import { capturedLogs } from "../helpers.ts";
import { gate } from "../hypervisor/scripted.ts";
import { inMs, ORIGIN, world } from "./world.ts";

const SECOND = 1_000;
const MINUTE = 60_000;

test("an instance that ends by itself is started again at once, and its history says so", async (t) => {
  const { instance, crash, clock, state, status, said, notes, hypervisor } = await world(t);
  const { id } = await instance();
  assert.equal(status(id), undefined);
  await crash(id, 3);
  assert.equal(state(id), "Stopped");
  const due = { attempts: 0, last_attempt_at: null, blocked_reason: null, last_reason: null };
  assert.deepEqual(status(id), { ...due, next_attempt_at: inMs(clock, 0) });
  await clock.pass(0);
  assert.equal(state(id), "Running");
  assert.deepEqual(status(id), { ...due, attempts: 1, last_attempt_at: inMs(clock, 0), next_attempt_at: null });
  assert.deepEqual(said(id), ["restart:scheduled", "restart:done"]);
  assert.deepEqual(notes.map(({ actor, cause }) => `${actor} ${cause}`), Array(2).fill("restart exit_code_3"));
  assert.match(notes[0].summary, /"web" is restarted now: it ended with exit code 3/);
  assert.equal(hypervisor.find(id)!.exit_code, null);
});

// H9
test("a crash loop is slower and slower, and bounded", async (t) => {
  const luck = [1, 0.5, 1, 1, 1, 1, 1];
  const { instance, crash, clock, state, status, said, starts } = await world(t, { random: () => luck.shift()! });
  const policy = { policy: "on_failure", backoff: "2s", max_backoff: "10s", max_attempts: 6 };
  const { id } = await instance("web", policy);
  // The first at once; then up to 2, 4, 8, 10 and 10 s, the second of which the luck halves.
  for (const wait of [0, 2, 2, 8, 10, 10]) {
    await crash(id);
    assert.equal(status(id)!.next_attempt_at, inMs(clock, wait * SECOND));
    if (wait > 0) await clock.pass(wait * SECOND - 1);
    assert.equal(state(id), "Stopped");
    await clock.pass(1);
    assert.equal(state(id), "Running");
  }
  await crash(id);
  const { attempts, blocked_reason, next_attempt_at } = status(id)!;
  assert.deepEqual([attempts, blocked_reason, next_attempt_at], [6, "max_attempts_exceeded", null]);
  await clock.pass(60 * MINUTE);
  assert.deepEqual([state(id), starts()], ["Stopped", 7]);
  assert.deepEqual(said(id).slice(-2), ["restart:done", "restart:gave_up"]);
});

// H9
test("attempts are counted from zero after stable_after in Running, which Standby does not add to", async (t) => {
  const { instance, crash, clock, status, hypervisor } = await world(t);
  const { id } = await instance("web", { policy: "always", stable_after: "10m" });
  for (const wait of [0, 5, 10]) {
    await clock.pass(MINUTE);
    await crash(id);
    await clock.pass(wait * SECOND);
  }
  assert.equal(status(id)!.attempts, 3);
  await clock.pass(5 * MINUTE);
  await hypervisor.standby(id, ORIGIN);
  await clock.pass(60 * MINUTE);
  await hypervisor.restore(id, ORIGIN);
  assert.equal(status(id)!.attempts, 3);
  await clock.pass(5 * MINUTE - 1);
  assert.equal(status(id)!.attempts, 3);
  await clock.pass(1);
  assert.equal(status(id), undefined);
  await crash(id);
  assert.equal(status(id)!.next_attempt_at, inMs(clock, 0));
});

// H5
test("exit 0 completes an instance whose policy is on_failure; any other end of its own does not", async (t) => {
  const { instance, crash, clock, state, status, said } = await world(t);
  for (
    const [policy, exit_code, after] of [
      ["on_failure", 0, "Stopped"],
      ["on_failure", 1, "Running"],
      ["on_failure", null, "Running"],
      ["always", 0, "Running"],
      ["never", 1, "Stopped"],
    ] as const
  ) {
    const { id } = await instance(`one-${policy.replace("_", "-")}-${exit_code}`, { policy });
    await crash(id, exit_code);
    await clock.pass(10 * MINUTE);
    assert.equal(state(id), after, `${policy} ${exit_code}`);
    if (after === "Stopped") assert.deepEqual([status(id), said(id)], [undefined, []], `${policy} ${exit_code}`);
  }
});

test("what somebody stops stays stopped, through crashes before and policies after, until it is started", async (t) => {
  const { instance, crash, clock, state, status, hypervisor, restart } = await world(t);
  const { id } = await instance("web", null);
  await hypervisor.stop(id, ORIGIN);
  assert.equal(status(id), undefined);
  await hypervisor.update(id, { restart_policy: { policy: "always" } }, ORIGIN);
  await clock.pass(60 * MINUTE);
  assert.deepEqual([state(id), status(id)!.blocked_reason], ["Stopped", "manual_stop"]);
  assert.deepEqual(restart.stats(), { waiting: 0, blocked: { manual_stop: 1, max_attempts_exceeded: 0 } });
  await hypervisor.start(id, ORIGIN);
  assert.equal(status(id), undefined);
  await crash(id);
  await clock.pass(0);
  await crash(id);
  assert.deepEqual(restart.stats(), { waiting: 1, blocked: { manual_stop: 0, max_attempts_exceeded: 0 } });
  // It is stopped already: the registry has nothing to change.
  await hypervisor.stop(id, ORIGIN);
  const { blocked_reason, next_attempt_at, attempts } = status(id)!;
  assert.deepEqual([blocked_reason, next_attempt_at, attempts], ["manual_stop", null, 1]);
  await clock.pass(60 * MINUTE);
  assert.equal(state(id), "Stopped");
});

test("manual_stop is on disk before the shutdown begins, and stays when that fails", async (t) => {
  const { instance, driver, status, hypervisor, crash, clock, state } = await world(t);
  const { id } = await instance();
  let during: unknown;
  driver.script.stop = () => {
    during = status(id)?.blocked_reason;
    throw new Error("it does not listen");
  };
  await assert.rejects(hypervisor.stop(id, ORIGIN), /it does not listen/);
  assert.equal(during, "manual_stop");
  await crash(id);
  await clock.pass(60 * MINUTE);
  assert.equal(state(id), "Stopped");
});

test("start() of an instance that runs already says that it is wanted", async (t) => {
  const { instance, driver, status, hypervisor, crash, clock, state } = await world(t);
  const { id } = await instance();
  driver.script.stop = () => {
    throw new Error("it does not listen");
  };
  await assert.rejects(hypervisor.stop(id, ORIGIN));
  await hypervisor.start(id, ORIGIN);
  assert.equal(status(id), undefined);
  await crash(id);
  await clock.pass(0);
  assert.equal(state(id), "Running");
});

// H4
test("a stop between the decision and the start wins, whatever else is in the lane", async (t) => {
  const { instance, crash, clock, state, hypervisor, driver, starts, status } = await world(t);
  const { id } = await instance();
  await crash(id);
  // The lane is busy with something slow when the attempt is due, and the stop comes in behind it.
  const slow = gate();
  driver.script.inspect = slow.script;
  hypervisor.changed(id, "slow look");
  await slow.arrived;
  const passed = clock.pass(0);
  const stopped = hypervisor.stop(id, ORIGIN);
  await passed;
  assert.equal(state(id), "Stopped");
  delete driver.script.inspect;
  slow.open();
  await stopped;
  await clock.pass(60 * MINUTE);
  assert.deepEqual([state(id), starts(), status(id)!.blocked_reason], ["Stopped", 1, "manual_stop"]);
});

// H4
test("a stop overtakes a start that is under way", async (t) => {
  const { instance, crash, clock, state, hypervisor, driver, status } = await world(t);
  const { id } = await instance();
  const slow = gate();
  driver.script.start = slow.script;
  await crash(id);
  await clock.pass(0);
  await slow.arrived;
  await hypervisor.stop(id, ORIGIN);
  delete driver.script.start;
  await clock.pass(60 * MINUTE);
  assert.deepEqual([state(id), status(id)!.blocked_reason], ["Stopped", "manual_stop"]);
});

// H4
test("a start by somebody never shares the fate of a restart that a stop has made void", async (t) => {
  const { instance, crash, clock, state, hypervisor, driver } = await world(t);
  const { id } = await instance();
  await crash(id);
  const slow = gate();
  driver.script.inspect = slow.script;
  hypervisor.changed(id, "slow look");
  await slow.arrived;
  const stopped = hypervisor.stop(id, ORIGIN);
  const passed = clock.pass(0);
  await settle();
  const started = hypervisor.start(id, ORIGIN);
  delete driver.script.inspect;
  slow.open();
  await Promise.all([stopped, started, passed]);
  assert.equal(state(id), "Running");
});

// H4
test("one slow start delays no other, and gives its place away", async (t) => {
  const { instance, crash, clock, state, driver } = await world(t, { table: { max_concurrent: 1 } });
  const [first, second] = [await instance("first"), await instance("second")];
  const slow = gate();
  driver.script.start = (each, signal) => each.id === first.id ? slow.script(each, signal) : undefined;
  await crash(first.id);
  await crash(second.id);
  await clock.pass(1_999);
  assert.deepEqual([state(first.id), state(second.id)], ["Created", "Stopped"]);
  await clock.pass(1);
  assert.deepEqual([state(first.id), state(second.id)], ["Created", "Running"]);
  slow.open();
  await settle();
  assert.equal(state(first.id), "Running");
});

test("an attempt that fails counts, and the next one comes after the back-off", async (t) => {
  const logs = capturedLogs(t);
  const { instance, crash, clock, state, status, said, notes, driver } = await world(t);
  const { id } = await instance("web", { policy: "on_failure", max_attempts: 2 });
  driver.script.start = () => {
    throw new Error("no room");
  };
  await crash(id);
  await clock.pass(0);
  const { attempts, next_attempt_at } = status(id)!;
  assert.deepEqual([attempts, next_attempt_at], [1, inMs(clock, 5 * SECOND)]);
  await clock.pass(5 * SECOND);
  assert.deepEqual([state(id), status(id)!.blocked_reason], ["Stopped", "max_attempts_exceeded"]);
  const each = ["restart:scheduled", "restart:failed"];
  assert.deepEqual(said(id), [...each, ...each, "restart:gave_up"]);
  assert.match(notes.at(-2)!.summary, /Restart of "web" failed: Cannot start instance "web": no room/);
  assert.ok(
    logs.some((line) => line.includes("Instance web is not restarted any more after 2 attempts")),
    logs.join("\n"),
  );
});

test("an attempt that a guard refuses counts too", async (t) => {
  const plugin = {
    name: "strict",
    requires: ["hypervisor"],
    setup(host: import("../../main.ts").Host) {
      host.hooks.guard("before:start", ({ origin }) => {
        if (origin.actor === "restart") throw host.veto("no", "not now");
      });
    },
  } as const;
  const { instance, crash, clock, state, status, said } = await world(t, { plugins: [plugin] });
  const { id } = await instance("web", { policy: "always", max_attempts: 2 });
  await crash(id);
  await clock.pass(60 * MINUTE);
  assert.deepEqual([state(id), status(id)!.attempts], ["Stopped", 2]);
  const each = ["restart:scheduled", "restart:failed"];
  assert.deepEqual(said(id), [...each, ...each, "restart:gave_up"]);
});

test("a start or a restore of somebody that fails and leaves it Stopped is taken up", async (t) => {
  const { instance, clock, state, hypervisor, driver, notes } = await world(t);
  const { id } = await instance("web", { policy: "on_failure" });
  await hypervisor.stop(id, ORIGIN);
  const breaks = (action: "start" | "restore") => {
    driver.script[action] = (each) => {
      delete driver.script[action];
      driver.machines.set(each.id, { state: "Stopped", exit_code: 0, exit_message: null });
      throw new Error("broken");
    };
  };
  breaks("start");
  await assert.rejects(hypervisor.start(id, ORIGIN), /broken/);
  await clock.pass(0);
  assert.equal(state(id), "Running");
  await hypervisor.standby(id, ORIGIN);
  breaks("restore");
  await assert.rejects(hypervisor.restore(id, ORIGIN), /broken/);
  await clock.pass(5 * SECOND);
  assert.equal(state(id), "Running");
  assert.deepEqual([...new Set(notes.map(({ cause }) => cause))], ["start_failed", "restore_failed"]);
});

test("nothing is started from Standby or Unknown, nor what is being deleted", async (t) => {
  const { instance, crash, clock, state, hypervisor, driver, starts } = await world(t);
  const [asleep, lost, doomed] = [await instance("asleep"), await instance("lost"), await instance("doomed")];
  await hypervisor.standby(asleep.id, ORIGIN);
  driver.machines.set(lost.id, { state: "Unknown", error: "no answer" });
  hypervisor.changed(lost.id, "look");
  await crash(doomed.id);
  driver.script.delete = () => {
    throw new Error("busy");
  };
  await assert.rejects(hypervisor.delete(doomed.id, ORIGIN), /busy/);
  await clock.pass(60 * MINUTE);
  assert.deepEqual([state(asleep.id), state(lost.id), state(doomed.id)], ["Standby", "Unknown", "Stopped"]);
  assert.equal(starts(), 3);
  // What could not be told turns out to have ended: that is an end like any other.
  await crash(lost.id);
  await clock.pass(0);
  assert.equal(state(lost.id), "Running");
  delete driver.script.delete;
  await hypervisor.delete(doomed.id, ORIGIN);
});

test("a fork that is made in Stopped has not ended, and one in any state begins with no attempts", async (t) => {
  const { instance, crash, clock, state, hypervisor, status } = await world(t);
  const { id } = await instance("web", { policy: "always", max_attempts: 1 });
  await crash(id);
  await clock.pass(0);
  await crash(id);
  const copy = await hypervisor.fork(id, { name: "copy" }, ORIGIN);
  await clock.pass(60 * MINUTE);
  assert.deepEqual([state(copy.id), status(copy.id)], ["Stopped", undefined]);
  await hypervisor.start(copy.id, ORIGIN);
  await crash(copy.id);
  await clock.pass(0);
  assert.equal(state(copy.id), "Running");
});

test("an update of the policy begins anew, and starts what ended by itself", async (t) => {
  const { instance, crash, clock, state, hypervisor, status } = await world(t);
  const { id } = await instance("web", null);
  await crash(id);
  await clock.pass(MINUTE);
  assert.equal(state(id), "Stopped");
  await hypervisor.update(id, { restart_policy: { policy: "always", max_attempts: 1 } }, ORIGIN);
  await clock.pass(0);
  assert.equal(state(id), "Running");
  await crash(id);
  assert.equal(status(id)!.blocked_reason, "max_attempts_exceeded");
  await hypervisor.update(id, { tags: { any: "other" } }, ORIGIN);
  assert.equal(status(id)!.blocked_reason, "max_attempts_exceeded");
  await hypervisor.update(id, { restart_policy: { policy: "always", max_attempts: 2 } }, ORIGIN);
  await clock.pass(0);
  assert.deepEqual([state(id), status(id)!.attempts], ["Running", 1]);
  await crash(id);
  await hypervisor.update(id, { restart_policy: null }, ORIGIN);
  await clock.pass(60 * MINUTE);
  assert.deepEqual([state(id), status(id)], ["Stopped", undefined]);
});

test("a change that is rolled back changes no ledger", async (t) => {
  let broken = false;
  const plugin = {
    name: "broken",
    requires: ["hypervisor"],
    setup(host: import("../../main.ts").Host) {
      host.hooks.commit("instance:commit", () => {
        if (broken) throw new Error("no");
      }, { priority: -1 });
    },
  } as const;
  capturedLogs(t);
  const { instance, crash, clock, state, hypervisor, status } = await world(t, { plugins: [plugin] });
  const { id } = await instance();
  broken = true;
  await assert.rejects(hypervisor.stop(id, ORIGIN), /no/);
  await crash(id);
  assert.deepEqual([state(id), status(id)], ["Running", undefined]);
  broken = false;
  hypervisor.changed(id, "reconcile");
  await settle();
  assert.equal(state(id), "Stopped");
  // An attempt that cannot even be begun counts, for its failure can be written; it does not come again at once.
  broken = true;
  await clock.pass(0);
  assert.deepEqual([state(id), status(id)!.attempts], ["Stopped", 1]);
  assert.equal(status(id)!.next_attempt_at, inMs(clock, 5 * SECOND));
  broken = false;
  await clock.pass(5 * SECOND);
  assert.equal(state(id), "Running");
});

test("attempts come again, and not in a rush, when nothing can be written", async (t) => {
  let broken = false;
  const plugin = {
    name: "full",
    requires: ["hypervisor"],
    setup(host: import("../../main.ts").Host) {
      const fill = () => {
        if (broken) throw new Error("database or disk is full");
      };
      host.hooks.commit("instance:commit", fill);
      host.hooks.commit("note:commit", fill);
    },
  } as const;
  const logs = capturedLogs(t);
  const { instance, crash, clock, state } = await world(t, { plugins: [plugin] });
  const { id } = await instance();
  await crash(id);
  broken = true;
  await clock.pass(MINUTE);
  const told = logs.filter((line) => line.startsWith("error")).length;
  assert.ok(told > 2 && told < 40, `${told} errors in a minute`);
  broken = false;
  await clock.pass(5 * SECOND);
  assert.equal(state(id), "Running");
});

test("a wall clock that steps back delays an attempt by no more than the longest back-off", async (t) => {
  const { instance, crash, clock, state, status } = await world(t);
  const { id } = await instance("web", { policy: "always", max_backoff: "1m", stable_after: "10m" });
  for (let i = 0; i < 5; i++) {
    await crash(id);
    await clock.pass(MINUTE);
  }
  await crash(id);
  clock.step(-24 * 60 * MINUTE);
  await clock.pass(MINUTE);
  assert.equal(state(id), "Running");
  clock.step(-24 * 60 * MINUTE);
  await clock.pass(25 * MINUTE);
  assert.equal(status(id), undefined);
});

test("the field is checked, with a code of its own", async (t) => {
  const { hypervisor } = await world(t);
  const wrong = [
    { policy: "sometimes" },
    { policy: "always", backoff: "0s" },
    { policy: "always", backoff: "soon" },
    { policy: "always", backoff: "10s", max_backoff: "5s" },
    { policy: "always", max_attempts: -1 },
    { policy: "always", max_attempts: 1.5 },
    { policy: "always", stable_after: "0" },
    { policy: "always", on_unhealthy: "yes" },
    { policy: "always", unless: "stopped" },
    "always",
  ];
  for (const restart_policy of wrong) {
    await assert.rejects(
      hypervisor.create({ name: "web", image: "any", restart_policy }, ORIGIN),
      (error) => error instanceof DormouseError && error.code === "invalid_restart_policy",
      JSON.stringify(restart_policy),
    );
  }
  const { policies } = await hypervisor.create(
    { name: "web", image: "any", restart_policy: { policy: "always", backoff: "90s" } },
    ORIGIN,
  );
  assert.deepEqual(policies.restart_policy, {
    policy: "always",
    backoff: "1m30s",
    max_backoff: "5m0s",
    max_attempts: 0,
    stable_after: "10m0s",
    on_unhealthy: false,
  });
});
