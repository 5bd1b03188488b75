import assert from "node:assert/strict";
import { describe, it } from "node:test";
import { Slots } from "../../plugins/health/slots.ts";
import { settle } from "../clock.ts";

describe("offer()", () => {
  it("begins only some of many in one turn of the event loop, and all of them in the end", async () => {
    const { promise, resolve } = Promise.withResolvers<void>();
    const slots = new Slots<number>(100, () => promise);
    for (let i = 0; i < 100; i++) slots.offer(i);
    assert.deepEqual([slots.running, slots.waiting], [8, 92]);
    await settle(1);
    assert.ok(slots.running <= 24, `${slots.running} after a turn`);
    await settle(15);
    assert.deepEqual([slots.running, slots.waiting], [100, 0]);
    resolve();
    await slots.close();
  });

  it("takes an item once, and runs it again when it is offered after its turn", async () => {
    const begun: string[] = [];
    const slots = new Slots<string>(1, async (item) => void begun.push(item));
    for (const item of ["a", "b", "b", "c", "b"]) slots.offer(item);
    slots.offer("c", { urgent: true });
    slots.offer("c", { urgent: true });
    await settle();
    slots.offer("b");
    await settle();
    assert.deepEqual(begun, ["a", "c", "b", "b"]);
    assert.equal(slots.has("b"), false);
  });
});

describe("close()", () => {
  it("begins nothing more and waits for what was begun", async () => {
    const ends: (() => void)[] = [];
    const slots = new Slots<number>(2, () => new Promise<void>((resolve) => ends.push(resolve)));
    for (let i = 0; i < 4; i++) slots.offer(i);
    let closed = false;
    const closing = slots.close().then(() => closed = true);
    slots.offer(9);
    await settle();
    assert.deepEqual([ends.length, slots.waiting, closed], [2, 0, false]);
    for (const end of ends) end();
    await closing;
    assert.deepEqual([ends.length, slots.running], [2, 0]);
  });
});
