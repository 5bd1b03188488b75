import assert from "node:assert/strict";
import { test } from "node:test";
import { Slots } from "../../plugins/qemu/slots.ts";

const NEVER = new AbortController().signal;

test("Slots.take() lets so many in at a time, in the order in which they came", async () => {
  const slots = new Slots(2);
  const order: string[] = [];
  const first = await slots.take(NEVER);
  const second = await slots.take(NEVER);
  const third = slots.take(NEVER).then((slot) => (order.push("third"), slot));
  const fourth = slots.take(NEVER).then((slot) => (order.push("fourth"), slot));
  await Promise.resolve();
  assert.deepEqual(order, []);
  first[Symbol.dispose]();
  (await third)[Symbol.dispose]();
  (await fourth)[Symbol.dispose]();
  second[Symbol.dispose]();
  assert.deepEqual(order, ["third", "fourth"]);
});

test("Slots.take() rejects with the signal's reason, and leaves its place to the next", async () => {
  const slots = new Slots(1);
  const reason = new Error("no longer wanted");
  await assert.rejects(slots.take(AbortSignal.abort(reason)), (error) => error === reason);
  const held = await slots.take(NEVER);
  const leaving = new AbortController();
  const left = assert.rejects(slots.take(leaving.signal), (error) => error === reason);
  const next = slots.take(NEVER);
  leaving.abort(reason);
  await left;
  held[Symbol.dispose]();
  (await next)[Symbol.dispose]();
});
