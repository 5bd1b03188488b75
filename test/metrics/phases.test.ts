import assert from "node:assert/strict";
import { test } from "node:test";
import type { Instance, LifecycleEvent, State } from "../../main.ts";
import { Phases } from "../../plugins/metrics/phases.ts";

const instance = (state: State, id = "a") => ({ id, state, driver: "process" }) as Instance;
const event = (from: State | null, to: State | null, id = "a") =>
  ({ from, to, instance_id: id, instance: instance(to ?? from!, id) }) as LifecycleEvent;
const shown = (phases: Phases, instances: Instance[]) =>
  Object.fromEntries(phases.read(instances).map(({ state, count, spent }) => [state, [count, spent]]));

test("take() adds up the time in each state, from the event on", () => {
  let now = 0;
  const phases = new Phases(() => now);
  phases.take(event(null, "Created"));
  now += 10;
  phases.take(event("Created", "Running"));
  now += 100;
  assert.deepEqual(shown(phases, [instance("Running")]), { Created: [0, 10], Running: [1, 100] });
  phases.take(event("Running", null));
  now += 1000;
  assert.deepEqual(shown(phases, []), { Created: [0, 10], Running: [0, 100] });
});

test("take() counts nobody twice when the event comes after a count that has it already", () => {
  let now = 0;
  const phases = new Phases(() => now);
  phases.read([instance("Stopped")]);
  now += 10;
  // Both changes are committed, and told of only after this.
  phases.read([instance("Running")]);
  phases.take(event("Stopped", "Created"));
  phases.take(event("Created", "Running"));
  now += 10;
  for (const [count, spent] of Object.values(shown(phases, [instance("Running")]))) {
    assert.ok(count >= 0 && spent >= 0);
  }
  assert.deepEqual(shown(phases, [instance("Running")]).Running, [1, 10 + 0]);
  phases.read([]);
  phases.take(event("Running", null));
  now += 10;
  assert.deepEqual(shown(phases, []).Running, [0, 10]);
});
