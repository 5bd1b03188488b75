import assert from "node:assert/strict";
import { test } from "node:test";
import { DormouseError } from "../../main.ts";
import { restartPlugin } from "../../plugins/restart/mod.ts";
import { ManualClock, settle } from "../clock.ts";
import { gate, registryHost } from "../hypervisor/scripted.ts";
import { inMs, ORIGIN, world } from "./world.ts";

const SECOND = 1_000;
const MINUTE = 60_000;
const POLICY = { policy: "on_failure", on_unhealthy: true, max_attempts: 2 };

// H6
test("an unhealthy instance is stopped and started, through the same budget as its ends", async (t) => {
  const { instance, clinic, clock, state, status, said, events, crash, driver } = await world(t);
  const web = await instance("web", POLICY);
  await clinic.say(web, "unhealthy");
  assert.equal(status(web.id)!.last_reason, "health_check_failed");
  await clock.pass(0);
  assert.deepEqual(driver.calls.slice(-3), ["stop", "validate", "start"]);
  const by = events.filter(({ actor }) => actor === "restart").map(({ action, to, cause }) =>
    `${action} ${to} ${cause}`
  );
  assert.deepEqual(by, [
    "state Shutdown health_check_failed",
    "stop Stopped health_check_failed",
    "state Created health_check_failed",
    "start Running health_check_failed",
  ]);
  assert.deepEqual(status(web.id), {
    attempts: 1,
    last_attempt_at: inMs(clock, 0),
    next_attempt_at: null,
    blocked_reason: null,
    last_reason: "health_check_failed",
  });
  await clinic.say(web, "healthy");
  // The next in a row is an end of its own: the back-off has begun.
  await crash(web.id);
  assert.equal(status(web.id)!.next_attempt_at, inMs(clock, 5 * SECOND));
  await clock.pass(5 * SECOND);
  await clinic.say(web, "unhealthy");
  assert.deepEqual([state(web.id), status(web.id)!.blocked_reason], ["Running", "max_attempts_exceeded"]);
  const each = ["restart:scheduled", "restart:done"];
  assert.deepEqual(said(web.id), [...each, ...each, "restart:gave_up"]);
  // It never was well for as long as it ran on: that is nothing to begin anew for.
  await clock.pass(60 * MINUTE);
  assert.equal(status(web.id)!.blocked_reason, "max_attempts_exceeded");
  await clinic.say(web, "healthy");
  assert.equal(status(web.id), undefined);
});

// H6
test("an unhealthy instance is left alone without on_unhealthy", async (t) => {
  const { instance, clinic, clock, said, driver } = await world(t);
  const web = await instance("web", { policy: "always" });
  await clinic.say(web, "unhealthy");
  await clock.pass(60 * MINUTE);
  assert.deepEqual([said(), driver.calls], [[], ["validate", "create", "start"]]);
});

// H6
test("an instance that is well again before its turn is not replaced", async (t) => {
  const { instance, clinic, clock, status, driver, hypervisor } = await world(t);
  const web = await instance("web", POLICY);
  await clinic.say(web, "unhealthy");
  await clock.pass(0);
  await clinic.say(web, "healthy");
  await clinic.say(web, "unhealthy");
  assert.equal(status(web.id)!.next_attempt_at, inMs(clock, 5 * SECOND));
  await clinic.say(web, "healthy");
  assert.equal(status(web.id)!.next_attempt_at, null);
  await clinic.say(web, "unhealthy");
  // Its turn comes, and while it waits in the lane nobody tells that it is well: that is seen under the lock.
  const slow = gate();
  driver.script.inspect = slow.script;
  hypervisor.changed(web.id, "slow look");
  await slow.arrived;
  const passed = clock.pass(5 * SECOND);
  await settle();
  clinic.states.set(web.id, "healthy");
  slow.open();
  await passed;
  const counts = driver.calls.filter((call) => call === "stop" || call === "start");
  assert.deepEqual(counts, ["start", "stop", "start"]);
  assert.deepEqual([status(web.id)!.attempts, status(web.id)!.next_attempt_at], [1, null]);
});

// H4, H6
test("a stop while an unhealthy instance is being replaced is never taken for the replacement's own", async (t) => {
  const { instance, clinic, clock, state, status, driver, hypervisor, events } = await world(t);
  const web = await instance("web", POLICY);
  const slow = gate();
  driver.script.stop = slow.script;
  await clinic.say(web, "unhealthy");
  await clock.pass(0);
  await slow.arrived;
  assert.equal(state(web.id), "Shutdown");
  const stopped = hypervisor.stop(web.id, ORIGIN);
  slow.open();
  assert.equal((await stopped).state, "Stopped");
  await clock.pass(60 * MINUTE);
  assert.deepEqual([state(web.id), status(web.id)!.blocked_reason], ["Stopped", "manual_stop"]);
  assert.ok(!events.some(({ action, actor }) => action === "start" && actor === "restart"));
});

test("an unhealthy instance that cannot be stopped is tried again after the back-off", async (t) => {
  const { instance, clinic, clock, state, status, said, driver } = await world(t);
  const web = await instance("web", POLICY);
  driver.script.stop = () => {
    throw new Error("it does not listen");
  };
  await clinic.say(web, "unhealthy");
  await clock.pass(0);
  assert.deepEqual([state(web.id), status(web.id)!.attempts], ["Running", 1]);
  assert.equal(status(web.id)!.next_attempt_at, inMs(clock, 5 * SECOND));
  assert.deepEqual(said(web.id), ["restart:scheduled", "restart:failed", "restart:scheduled"]);
  delete driver.script.stop;
  await clock.pass(5 * SECOND);
  assert.deepEqual([state(web.id), status(web.id)!.attempts, said(web.id).at(-1)], ["Running", 2, "restart:done"]);
});

test("an unhealthy instance that sleeps, or that ends by itself, is not replaced", async (t) => {
  const { instance, clinic, clock, state, status, driver, hypervisor, crash } = await world(t);
  const web = await instance("web", { ...POLICY, max_attempts: 0 });
  await clinic.say(web, "unhealthy");
  await hypervisor.standby(web.id, ORIGIN);
  await clock.pass(60 * MINUTE);
  assert.equal(state(web.id), "Standby");
  await hypervisor.restore(web.id, ORIGIN);
  await clinic.say(web, "unhealthy");
  await crash(web.id, 0);
  // Completed, and what is not running is not unwell.
  await clock.pass(60 * MINUTE);
  assert.deepEqual([state(web.id), status(web.id)], ["Stopped", undefined]);
  assert.ok(!driver.calls.includes("stop"));
});

// S10
test("on_unhealthy is judged anew by the next host", async (t) => {
  const first = await world(t);
  const web = await first.instance("web", POLICY);
  const next = await first.again(() => void first.clinic.states.set(web.id, "unhealthy"));
  await next.clock.pass(0);
  assert.deepEqual(next.driver.calls.slice(-3), ["stop", "validate", "start"]);
  assert.equal(next.status(web.id)!.attempts, 1);
});

test("on_unhealthy needs the plugin health", async (t) => {
  const plugins = [restartPlugin(new ManualClock(), () => 1)];
  const { hypervisor } = await registryHost(t, { plugins: plugins as never[] });
  await assert.rejects(
    hypervisor.create({ name: "web", image: "any", restart_policy: POLICY }, ORIGIN),
    (error) =>
      error instanceof DormouseError && error.code === "invalid_restart_policy" && /health/.test(error.message),
  );
});
