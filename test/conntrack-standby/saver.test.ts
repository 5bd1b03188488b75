import assert from "node:assert/strict";
import { test } from "node:test";
import { Saver } from "../../plugins/conntrack-standby/saver.ts";
import type { Store } from "../../main.ts";
import { ManualClock } from "../clock.ts";

function saver() {
  const clock = new ManualClock();
  const written: string[] = [];
  const failures: unknown[] = [];
  const disk = { full: false, transactions: 0 };
  const store = {
    transaction(work: () => unknown) {
      disk.transactions++;
      if (disk.full) throw new Error("disk full");
      return work();
    },
  } as Store;
  const save = (id: string, value: number) => void written.push(`${id}=${value}`);
  const failed = (error: unknown) => void failures.push(error);
  return { clock, written, failures, disk, saver: new Saver<number>({ store, clock, save, failed }) };
}

// I13, S9: bounded in rate, and the last value reaches the disk.
test("later() writes one value in five seconds, the last one always", async () => {
  const { clock, written, saver: saves } = saver();
  for (let i = 0; i < 40; i++) {
    saves.later("a", () => i);
    await clock.pass(250);
  }
  await clock.pass(10_000);
  assert.deepEqual([written[0], written.at(-1)], ["a=0", "a=39"]);
  assert.ok(written.length <= 4, written.join());
  assert.equal(clock.timers, 0);
});

test("later() writes what is due together in one transaction, and not what has not changed", async () => {
  const { clock, written, disk, saver: saves } = saver();
  for (let i = 0; i < 100; i++) saves.later(`i${i}`, () => i);
  await clock.pass(250);
  assert.deepEqual([written.length, disk.transactions], [100, 1]);
  for (let i = 0; i < 100; i++) saves.later(`i${i}`, () => i);
  await clock.pass(10_000);
  assert.equal(written.length, 100);
});

test("now() writes at once and close() what waits", async () => {
  const { clock, written, saver: saves } = saver();
  saves.later("a", () => 1);
  saves.now("a", 2);
  assert.deepEqual(written, ["a=2"]);
  await clock.pass(1_000);
  saves.later("a", () => 3);
  saves.later("b", () => 4);
  saves.forget("b");
  saves.close();
  assert.deepEqual(written, ["a=2", "a=3"]);
  assert.equal(clock.timers, 0);
});

test("later() tries again what could not be written", async () => {
  const { clock, written, failures, disk, saver: saves } = saver();
  disk.full = true;
  saves.later("a", () => 1);
  await clock.pass(1_000);
  assert.equal(failures.length, 4);
  disk.full = false;
  await clock.pass(250);
  assert.deepEqual(written, ["a=1"]);
});
