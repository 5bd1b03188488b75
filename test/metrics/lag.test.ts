import assert from "node:assert/strict";
import { test } from "node:test";
import { PERIOD, steadyClock, watchLag } from "../../plugins/metrics/lag.ts";
import { ManualClock } from "../clock.ts";
import { metricsWorld } from "./world.ts";

test("watchLag() tells of each period how late the timer rang", async () => {
  const clock = new ManualClock();
  const told: number[] = [];
  const watch = watchLag(clock, (seconds) => told.push(seconds));
  await clock.pass(PERIOD * 3);
  assert.deepEqual(told, [0, 0, 0]);
  clock.step(250); // as if the loop had been blocked
  await clock.pass(PERIOD);
  assert.deepEqual(told, [0, 0, 0, 0.25]);
  clock.step(-1_000);
  await clock.pass(PERIOD);
  assert.deepEqual(told.slice(4), [0], "never less than none");
  watch[Symbol.dispose]();
  assert.equal(clock.timers, 0);
});

// monitorEventLoopDelay of Deno 2.9 says 0 here.
test("watchLag() notices a loop that is blocked, on this runtime", async () => {
  const told: number[] = [];
  const { promise, resolve } = Promise.withResolvers<void>();
  using _watch = watchLag(steadyClock, (seconds) => {
    told.push(seconds);
    if (told.length === 2) resolve();
  });
  for (const end = performance.now() + PERIOD * 3; performance.now() < end;);
  await promise;
  assert.ok(Math.max(...told) >= PERIOD * 2 / 1_000 * 0.9, `lags ${told}`);
});

test("the lag is a histogram with the budget of 20 ms among its buckets", async (t) => {
  const { clock, scrape } = await metricsWorld(t);
  await clock.pass(PERIOD);
  clock.step(30);
  await clock.pass(PERIOD);
  const series = await scrape();
  assert.equal(series['dormouse_event_loop_lag_seconds_bucket{le="0.02"}'], 1);
  assert.equal(series['dormouse_event_loop_lag_seconds_bucket{le="0.05"}'], 2);
});
