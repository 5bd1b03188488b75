import assert from "node:assert/strict";
import { test } from "node:test";
import { FlapDetector } from "../../plugins/conntrack-standby/flap.ts";

const OPTIONS = { cycles: 4, window: 60_000, backoff: 1_000, backoffMax: 5_000 };

// I29
test("woken() asks for a growing back-off from the wake on that is one too many in the window", () => {
  const flap = new FlapDetector(OPTIONS);
  assert.deepEqual([1, 2, 3, 4, 5, 6, 7, 8].map((s) => flap.woken(s * 1_000)), [
    0,
    0,
    0,
    1_000,
    2_000,
    4_000,
    5_000,
    5_000,
  ]);
  assert.equal(flap.cycles, 4);
});

test("woken() asks for nothing when wakes are rare, and begins small again after a quiet time", () => {
  const flap = new FlapDetector(OPTIONS);
  for (let i = 0; i < 20; i++) assert.equal(flap.woken(i * 20_001), 0, String(i));
  const at = 1_000_000;
  assert.deepEqual([0, 1, 2, 3, 4].map((ms) => flap.woken(at + ms)), [0, 0, 0, 1_000, 2_000]);
  assert.deepEqual([0, 1, 2, 3].map((ms) => flap.woken(at + 100_000 + ms)), [0, 0, 0, 1_000]);
});

test("woken() counts no wake from before the clock stepped back", () => {
  const flap = new FlapDetector(OPTIONS);
  for (const at of [9_000, 9_001, 9_002, 1, 2, 3]) assert.equal(flap.woken(at), 0);
  assert.equal(flap.woken(4), 1_000);
});

test("woken() never asks for anything when it is off", () => {
  const flap = new FlapDetector({ ...OPTIONS, cycles: 0 });
  for (let i = 0; i < 100; i++) assert.equal(flap.woken(i), 0);
});
