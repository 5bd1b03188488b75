import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { ManualClock } from "../clock.ts";
import { temporaryFolder, until } from "../helpers.ts";
import { ORIGIN, ScriptedDriver } from "../hypervisor/scripted.ts";
import { assertOrdered, type Delivered, passUntil, Receiver, receiver, world } from "./webhook-world.ts";

const LIMIT = { timeout: 540_000 };

test("a receiver that never answers holds up no other webhook and no action", LIMIT, async (t) => {
  const [stuck, to] = [await receiver(t), await receiver(t)];
  stuck.answer = () => () => {};
  const { instance, note, hypervisor, stats } = await world(t, [{ url: stuck.url }, { url: to.url }]);
  const { id } = await instance("web");
  for (let i = 0; i < 500; i++) note(id);
  await hypervisor.standby(id, ORIGIN);
  await hypervisor.restore(id, ORIGIN);
  await hypervisor.stop(id, ORIGIN);
  await hypervisor.delete(id, ORIGIN);
  await until("the other has all, and has said so", () => stats(1).backlog === 0);
  assert.equal(to.taken.at(-1)?.body.event, "delete");
  assert.deepEqual(to.taken.map(({ body }) => body.seq), to.taken.map((_, i) => i + 1));
  assert.equal(stuck.requests.length, 1, "one at a time for one instance");
  assert.equal(stats(0).backlog, to.taken.length);
});

test("instances whose events are refused hold up no others, and theirs are kept in order", LIMIT, async (t) => {
  const to = await receiver(t);
  const { instance, note, clock, stats, journal } = await world(t, [{ url: to.url, max_backoff: "10s" }]);
  const ids: string[] = [];
  for (let i = 0; i < 40; i++) ids.push((await instance(`i${i}`)).id);
  await until("all is sent", () => stats().sent === 80);
  const bad = new Set(ids.slice(0, 10));
  to.answer = ({ body }) => bad.has(body.instance as string) ? 422 : 204;
  for (let i = 0; i < 2000; i++) note(ids[i % 40]);
  await passUntil(clock, () => stats().sent === 1580);
  assert.equal(stats().backlog, 500);
  assert.ok(to.taken.slice(80).every(({ body }) => !bad.has(body.instance as string)));
  to.answer = () => 204;
  await passUntil(clock, () => stats().backlog === 0);
  assert.equal(to.taken.length, journal.last);
  assertOrdered(to.taken);
});

test("a bounded number of requests is under way at once, and one for an instance", LIMIT, async (t) => {
  const to = await receiver(t);
  const open = new Map<unknown, number>();
  let most = 0;
  to.answer = async ({ body }) => {
    open.set(body.instance, (open.get(body.instance) ?? 0) + 1);
    most = Math.max(most, open.get(body.instance)!);
    await new Promise((resolve) => setTimeout(resolve, 1));
    open.set(body.instance, open.get(body.instance)! - 1);
    return 204;
  };
  const { instance, note, stats, journal } = await world(t, [{ url: to.url }]);
  const ids: string[] = [];
  for (let i = 0; i < 100; i++) ids.push((await instance(`i${i}`)).id); // more than there are lanes
  for (let i = 0; i < 500; i++) note(ids[(i * 7) % 100]);
  await until("all is sent", () => stats().sent === journal.last, 180_000);
  assert.equal(to.taken.length, 700);
  assertOrdered(to.taken);
  assert.equal(most, 1);
  assert.ok(to.widest > 1 && to.widest <= 8, String(to.widest));
});

const INSTANCES = 5;
const OP = fc.oneof(
  {
    weight: 8,
    arbitrary: fc.record({
      op: fc.constant("note" as const),
      i: fc.nat(INSTANCES - 1),
      n: fc.integer({ min: 1, max: 9 }),
    }),
  },
  { weight: 4, arbitrary: fc.record({ op: fc.constant("pass" as const), ms: fc.integer({ min: 1, max: 20_000 }) }) },
  { weight: 4, arbitrary: fc.record({ op: fc.constant("await" as const), n: fc.integer({ min: 1, max: 6 }) }) },
  {
    weight: 3,
    arbitrary: fc.record({
      op: fc.constant("mood" as const),
      // Of each instance: takes, refuses, breaks off, hangs, takes and breaks off.
      moods: fc.array(fc.nat(4), { minLength: INSTANCES, maxLength: INSTANCES }),
    }),
  },
  { weight: 1, arbitrary: fc.record({ op: fc.constant("restart" as const) }) },
);

// E7
test(
  "no first delivery overtakes an earlier one of its instance, whatever fails, and in the end all are there",
  LIMIT,
  async (t) => {
    let [events, doubled] = [0, 0];
    await fc.assert(
      fc.asyncProperty(fc.array(OP, { maxLength: 60, size: "max" }), fc.boolean(), async (ops, typed) => {
        await using to = new Receiver();
        await to.listen();
        const moods = new Map<unknown, number>();
        const came: Delivered[] = [];
        to.answer = (delivered) => {
          const mood = moods.get(delivered.body.instance) ?? 0;
          if (mood === 0 || mood === 4) came.push(delivered);
          if (mood === 3) return () => {};
          return mood === 0 ? 204 : mood === 1 ? 503 : (response) => response.destroy();
        };
        const webhooks = [{ url: to.url, max_backoff: "5s", timeout: "60s", ...(typed && { types: ["test:named"] }) }];
        const before = { folder: temporaryFolder(t), driver: new ScriptedDriver() };
        const clock = new ManualClock(Date.now());
        let now = await world(t, webhooks, { before, clock });
        const ids: string[] = [];
        for (let i = 0; i < INSTANCES; i++) ids.push((await now.instance(`i${i}`)).id);
        const wanted: number[] = typed ? [] : Array.from({ length: 2 * INSTANCES }, (_, i) => i + 1);
        for (const each of ops) {
          if (each.op === "note") {
            for (let k = 0; k < each.n; k++) {
              const type = (k + each.i) % 3 ? "test:named" : "test:noted";
              const seq = now.note(ids[each.i], type);
              if (!typed || type === "test:named") wanted.push(seq);
            }
          } else if (each.op === "pass") await clock.pass(each.ms);
          else if (each.op === "mood") each.moods.forEach((mood, i) => moods.set(ids[i], mood));
          else if (each.op === "await") {
            for (let k = 0; k < each.n; k++) await new Promise((resolve) => setTimeout(resolve, 1));
          } else {
            moods.forEach((mood, id) => mood === 3 && moods.set(id, 1)); // one that hangs would be waited for
            await now.host.close();
            now = await world(t, webhooks, { before, clock });
          }
        }
        moods.clear();
        await passUntil(clock, () => now.stats().backlog === 0);
        await now.host.close();
        assert.equal(clock.timers, 0);
        const seqs = [...new Set(came.map(({ body }) => body.seq as number))];
        assert.deepEqual(seqs.toSorted((a, b) => a - b), wanted);
        assertOrdered(came);
        events += wanted.length;
        doubled += came.length - wanted.length;
      }),
      { numRuns: 20 },
    );
    t.diagnostic(`${events} events, ${doubled} of them once more`);
  },
);
