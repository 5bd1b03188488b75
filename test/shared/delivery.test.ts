import assert from "node:assert/strict";
import { it } from "node:test";
import { Channel, type Lagged } from "../../plugins/shared/delivery.ts";

function options(lagged: (gap: Lagged) => void = () => {}, buffer = 256) {
  const failed = (error: unknown) => {
    throw error;
  };
  return { consumer: "test", buffer, counts: { dropped: 0, errors: 0 }, lagged, failed };
}

it("publish() keeps no more than the buffer when many items come within one tick", async () => {
  const channel = new Channel<number>();
  const seen: (number | Lagged)[] = [];
  const given = options((gap) => void seen.push({ ...gap }));
  const delivery = channel.subscribe((item) => void seen.push(item), given);
  for (let item = 1; item <= 5000; item++) channel.publish(item);
  assert.equal(channel.deliveries[0].depth, 257);
  await channel.idle();
  assert.deepEqual(seen, [...Array.from({ length: 256 }, (_, i) => i + 1), { from: 257, to: 5000 }]);
  assert.deepEqual([given.counts, delivery.busy], [{ dropped: 4744, errors: 0 }, false]);
});

it("subscribe() is not shown what was published before, also from within a handler", async () => {
  const channel = new Channel<number>();
  const seen: string[] = [];
  const join = (name: string) => void channel.subscribe((item) => void seen.push(`${name}${item}`), options());
  channel.subscribe((item) => {
    if (item === 1) channel.publish(3);
    if (item === 2) join("b");
  }, options());
  channel.publish(1);
  join("a");
  channel.publish(2);
  await channel.idle();
  channel.publish(4);
  await channel.idle();
  assert.deepEqual(seen, ["a2", "a3", "a4", "b4"]);
});

it("unsubscribe() resolves once the handler under way has ended, and nothing is handed over after it", async () => {
  const channel = new Channel<number>();
  const seen: string[] = [];
  const slow = Promise.withResolvers<void>();
  const delivery = channel.subscribe(async (item) => {
    seen.push(`begins ${item}`);
    await slow.promise;
    seen.push(`ends ${item}`);
  }, options());
  channel.publish(1);
  channel.publish(2);
  await Promise.resolve();
  const gone = channel.unsubscribe(delivery).then(() => seen.push("gone"));
  channel.publish(3);
  await new Promise(setImmediate);
  assert.deepEqual(seen, ["begins 1"]);
  slow.resolve();
  await gone;
  assert.deepEqual([seen, delivery.busy, delivery.depth], [["begins 1", "ends 1", "gone"], false, 0]);
});

it("idle() tells whether there was anything to wait for", async () => {
  const channel = new Channel<number>();
  assert.equal(await channel.idle(), false);
  channel.publish(1);
  assert.equal(await channel.idle(), true);
  channel.subscribe(() => Promise.resolve(), options());
  channel.publish(2);
  assert.equal(channel.deliveries.length, 1);
  assert.equal(await channel.idle(), true);
  assert.equal(await channel.idle(), false);
});
