import assert from "node:assert/strict";
import { test } from "node:test";
import { inMs, ORIGIN, world } from "./world.ts";

const SECOND = 1_000;
const MINUTE = 60_000;

// S10
test("an attempt that waits for its back-off is made by the next host, when it is due", async (t) => {
  const first = await world(t);
  const { id } = await first.instance();
  await first.crash(id);
  await first.clock.pass(0);
  await first.crash(id);
  const due = inMs(first.clock, 5 * SECOND);
  const next = await first.again(() => first.clock.pass(2 * SECOND));
  assert.equal(first.clock.timers, 1);
  assert.deepEqual([next.status(id)!.next_attempt_at, next.status(id)!.attempts], [due, 1]);
  await next.clock.pass(3 * SECOND - 1);
  assert.equal(next.state(id), "Stopped");
  await next.clock.pass(1);
  assert.deepEqual([next.state(id), next.status(id)!.attempts], ["Running", 2]);
  // What was said before is not said again.
  assert.deepEqual([first.said(), next.said()], [["restart:scheduled", "restart:done", "restart:scheduled"], [
    "restart:done",
  ]]);
});

// S10
test("one that is overdue when the host starts is made at once, and a back-off that ends while it is down too", async (t) => {
  const first = await world(t);
  const { id } = await first.instance();
  await first.crash(id);
  await first.clock.pass(0);
  await first.crash(id);
  const next = await first.again(() => first.clock.pass(MINUTE));
  await next.clock.pass(0);
  assert.equal(next.state(id), "Running");
});

// H8, S10
test("what ended while no host looked is found so and started, with the attempts of before", async (t) => {
  const first = await world(t);
  const [web, job, stopped] = [
    await first.instance("web"),
    await first.instance("job", { policy: "on_failure" }),
    await first.instance("stopped"),
  ];
  await first.crash(web.id);
  await first.clock.pass(0);
  await first.hypervisor.stop(stopped.id, ORIGIN);
  const next = await first.again(async () => {
    const gone = (exit_code: number | null) => ({ state: "Stopped", exit_code, exit_message: "gone" }) as const;
    first.driver.machines.set(web.id, gone(null));
    first.driver.machines.set(job.id, gone(0));
    // Nobody knows how much of this it ran: it does not make it stable.
    await first.clock.pass(60 * MINUTE);
  });
  assert.deepEqual([next.state(web.id), next.status(web.id)!.attempts], ["Stopped", 1]);
  assert.equal(next.status(web.id)!.next_attempt_at, inMs(next.clock, 5 * SECOND));
  await next.clock.pass(5 * SECOND);
  assert.deepEqual([web, job, stopped].map(({ id }) => next.state(id)), ["Running", "Stopped", "Stopped"]);
});

// S10
test("stable_after goes on over a restart of the host", async (t) => {
  const first = await world(t);
  const { id } = await first.instance("web", { policy: "always", stable_after: "10m" });
  await first.crash(id);
  await first.clock.pass(4 * MINUTE);
  const next = await first.again(() => first.clock.pass(4 * MINUTE));
  await next.clock.pass(2 * MINUTE - 1);
  assert.equal(next.status(id)!.attempts, 1);
  await next.clock.pass(1);
  assert.equal(next.status(id), undefined);
});

// S10
test("a wall clock that stepped back while no host ran makes no attempt wait for longer than it could", async (t) => {
  const first = await world(t);
  const { id } = await first.instance("web", { policy: "always", max_backoff: "1m", stable_after: "10m" });
  await first.crash(id);
  await first.clock.pass(0);
  await first.crash(id);
  const next = await first.again(() => first.clock.step(-24 * 60 * MINUTE));
  await next.clock.pass(MINUTE);
  assert.equal(next.state(id), "Running");
  const last = await next.again(() => first.clock.step(-24 * 60 * MINUTE));
  await last.clock.pass(10 * MINUTE);
  assert.equal(last.status(id), undefined);
});

// H4, S10
test("a stop is remembered by every host after", async (t) => {
  const first = await world(t);
  const { id } = await first.instance();
  await first.crash(id);
  await first.hypervisor.stop(id, ORIGIN);
  const next = await first.again();
  await next.clock.pass(60 * MINUTE);
  assert.deepEqual([next.state(id), next.status(id)!.blocked_reason], ["Stopped", "manual_stop"]);
});

test("what happens while the plugin is off makes nothing start that somebody has stopped", async (t) => {
  const first = await world(t);
  const [pending, healthy, wanted] = [
    await first.instance("pending"),
    await first.instance("healthy", { policy: "always", on_unhealthy: true }),
    await first.instance("wanted"),
  ];
  await first.crash(pending.id);
  await first.clinic.say(healthy, "unhealthy");
  await first.hypervisor.stop(wanted.id, ORIGIN);
  await first.host.close();
  const off = await world(t, { ...first, off: true });
  await off.hypervisor.start(pending.id, ORIGIN);
  await off.hypervisor.stop(pending.id, ORIGIN);
  await off.hypervisor.stop(healthy.id, ORIGIN);
  await off.hypervisor.start(wanted.id, ORIGIN);
  const next = await off.again();
  await next.clock.pass(60 * MINUTE);
  const states = () => [pending, healthy, wanted].map(({ id }) => next.state(id));
  assert.deepEqual(states(), ["Stopped", "Stopped", "Running"]);
  // That one was started since, so what was asked before is over.
  await next.crash(wanted.id);
  await next.clock.pass(0);
  assert.deepEqual(states(), ["Stopped", "Stopped", "Running"]);
});
