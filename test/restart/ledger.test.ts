import assert from "node:assert/strict";
import { test } from "node:test";
import * as v from "valibot";
import type { CommitContext, Instance, LifecycleEvent } from "../../main.ts";
import { BLANK, follow, type Ledger, resumed, type Terms } from "../../plugins/restart/ledger.ts";
import { delayAfter, normalise, RestartPolicy } from "../../plugins/restart/policy.ts";
import { instanceOf } from "../process/fixture.ts";

const NOW = Date.UTC(2030, 0, 1);
const policy = normalise(v.parse(RestartPolicy, { policy: "on_failure", on_unhealthy: true, max_attempts: 3 }), {
  health: true,
})!;
const terms: Terms = { policy, now: NOW, random: () => 1 };

/** The ledger after an instance went from one state to another, `action` being `state` where nothing else is said. */
function after(
  ledger: Ledger,
  before: Partial<Instance>,
  now: Partial<Instance>,
  event: Partial<LifecycleEvent> = {},
): Ledger {
  const was = instanceOf("", before);
  const context = { event: { action: "state", actor: "system", cause: "exit", ...event }, before: was };
  return follow(ledger, { ...context, after: { ...was, transition: null, ...now } } as CommitContext, terms);
}

const OURS = { actor: "restart", cause: "health_check_failed" };
const RECOVERED = { cause: "recovery" };

// S10: what a host that died in the middle leaves is brought to an end by the next one, which is a change like any other.
test("follow() goes on with a replacement that a host died in, wherever it was", () => {
  const begun = after(BLANK, { state: "Running" }, { state: "Shutdown", transition: "stop" }, OURS);
  assert.deepEqual([begun.attempts, begun.replacing, begun.next_attempt_at], [1, true, null]);
  // In the stop.
  const stopped = after(
    begun,
    { state: "Shutdown", transition: "stop" },
    { state: "Stopped", exit_code: 0 },
    RECOVERED,
  );
  assert.deepEqual([stopped.attempts, stopped.replacing, stopped.next_attempt_at], [1, true, NOW]);
  // Between the stop and the start.
  assert.deepEqual(resumed(stopped, instanceOf("", { state: "Stopped" }), NOW), stopped);
  // In the start, which came to nothing, and which is the same attempt.
  const started = after(stopped, { state: "Stopped" }, { state: "Created", transition: "start" }, OURS);
  assert.deepEqual([started.attempts, started.replacing, started.next_attempt_at], [1, false, null]);
  const lost = after(
    started,
    { state: "Created", transition: "start" },
    { state: "Stopped", exit_code: null },
    RECOVERED,
  );
  assert.deepEqual([lost.attempts, lost.next_attempt_at], [1, NOW + 5_000]);
});

// H4, S10
test("follow() takes the end of somebody's stop for no end of its own, in the host after too", () => {
  const begun = after(BLANK, { state: "Running" }, { state: "Shutdown", transition: "stop" }, { actor: "api" });
  assert.equal(begun.blocked_reason, "manual_stop");
  for (const event of [{ action: "stop", actor: "api" }, RECOVERED, { cause: "stop_failed" }] as const) {
    assert.deepEqual(after(begun, { state: "Shutdown", transition: "stop" }, { state: "Stopped" }, event), begun);
  }
});

test("follow() judges a start that a host died in by what became of it", () => {
  const begun = { state: "Created", transition: "start" } as const;
  for (
    const [now, event, next] of [
      [{ state: "Stopped", exit_code: 0 }, RECOVERED, null],
      [{ state: "Stopped", exit_code: 1 }, RECOVERED, NOW],
      [{ state: "Stopped", exit_code: null }, RECOVERED, NOW],
      [{ state: "Running" }, RECOVERED, null],
      // What the exit code says is of the run before: the driver itself says that this one failed.
      [{ state: "Stopped", exit_code: 0 }, { cause: "start_failed" }, NOW],
      [{ state: "Unknown" }, { cause: "start_failed" }, null],
    ] as const
  ) {
    assert.equal(after(BLANK, begun, now, event).next_attempt_at, next, JSON.stringify([now, event]));
  }
});

test("resumed() keeps what is about this run, and only what can be so now", () => {
  const pending = { ...BLANK, attempts: 2, next_attempt_at: NOW, ended: { reason: "exit_code_1", failed: true } };
  const at = (change: Partial<Instance>) => resumed(pending, instanceOf("", change), NOW);
  assert.deepEqual(at({ state: "Stopped" }), pending);
  assert.deepEqual(at({ state: "Stopped", started_at: 1 }), BLANK);
  for (const state of ["Standby", "Unknown", "Paused", "Initializing"] as const) {
    assert.equal(at({ state }).next_attempt_at, null, state);
  }
  const unwell = { ...pending, ended: null };
  assert.equal(resumed(unwell, instanceOf("", { state: "Running" }), NOW).next_attempt_at, NOW);
  // Somebody stopped it while nobody kept a ledger.
  assert.equal(resumed(unwell, instanceOf("", { state: "Stopped" }), NOW).next_attempt_at, null);
});

// H9
test("delayAfter() is anything up to a bound that doubles, from nothing up to max_backoff", () => {
  const bounds = [0, 1, 2, 3, 6, 7, 8, 2_000].map((attempts) => delayAfter(attempts, policy, () => 1));
  assert.deepEqual(bounds, [0, 5_000, 10_000, 20_000, 160_000, 300_000, 300_000, 300_000]);
  assert.deepEqual([1, 2, 3].map((attempts) => delayAfter(attempts, policy, () => 0)), [0, 0, 0]);
  assert.equal(delayAfter(3, policy, () => 0.25), 5_000);
});

test("normalise() lets max_backoff begin at the backoff where that is the longer one", () => {
  const kept = normalise(v.parse(RestartPolicy, { policy: "always", backoff: "1h" }), { health: false })!;
  assert.deepEqual([kept.backoff, kept.max_backoff], ["1h0m0s", "1h0m0s"]);
});
