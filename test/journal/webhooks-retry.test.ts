import assert from "node:assert/strict";
import { test } from "node:test";
import { ManualClock } from "../clock.ts";
import { capturedLogs, until } from "../helpers.ts";
import { registryHost } from "../hypervisor/scripted.ts";
import { assertOrdered, passUntil, receiver, world } from "./webhook-world.ts";

const LIMIT = { timeout: 540_000 };
const range = (from: number, to: number) => Array.from({ length: to - from + 1 }, (_, i) => from + i);

// E3, E7: retried for ever, at least once, in order.
test("a receiver that fails for a while gets everything, in order", LIMIT, async (t) => {
  const to = await receiver(t);
  const { instance, note, clock, stats, journal } = await world(t, [{ url: to.url, timeout: "100s" }]);
  let asked = 0;
  // Each way to fail there is: statuses, a connection that breaks, one that hangs, and a yes that gets lost.
  to.answer = (delivered) => {
    switch (asked++ < 60 ? asked % 6 : 0) {
      case 1:
        return 500;
      case 2:
        return (response) => response.destroy();
      case 3:
        return () => {};
      case 4:
        return 404;
      case 5:
        to.taken.push(delivered);
        return (response) => response.destroy();
      default:
        return 204;
    }
  };
  const ids = [(await instance("a")).id, (await instance("b")).id, (await instance("c")).id];
  for (let i = 0; i < 60; i++) note(ids[i % 3]);
  await passUntil(clock, () => stats().sent === journal.last);
  assert.equal(journal.last, 66);
  assert.deepEqual(to.seqs.toSorted((a, b) => a - b), range(1, 66));
  assertOrdered(to.taken);
  const doubled = to.taken.length - 66;
  t.diagnostic(`${to.requests.length} requests for 66 events, ${doubled} taken twice`);
  assert.ok(doubled > 0 && doubled <= 10, String(doubled));
  const { failed, backlog, lag_ms, lost } = stats();
  assert.deepEqual({ backlog, lag_ms, lost }, { backlog: 0, lag_ms: 0, lost: 0 });
  // Deno sends once more by itself what a connection that was used before has broken under.
  assert.ok(failed > 30, String(failed));
});

// E3: no busy loop while it is away for long, and no timer is left behind.
test(
  "retries come further and further apart, max_backoff at the most, and all at once when it is back",
  LIMIT,
  async (t) => {
    const to = await receiver(t);
    const logs = capturedLogs(t);
    const clock = new ManualClock(Date.now());
    const { after } = clock;
    const waits: number[] = [];
    // Beside the retries there are the time-out of a request, retention, and the cursor's way to the disk.
    clock.after = (ms, call) => {
      if (![3_600_000, 10_000, 500].includes(ms)) waits.push(ms);
      return after(ms, call);
    };
    const { instance, note, stats, journal, host } = await world(t, [{ url: to.url, max_backoff: "1m" }], { clock });
    const { id } = await instance("a");
    await to.when(({ taken }) => taken.length === 2);
    to.answer = () => 503;
    const [early, began] = [Date.now(), clock.now()];
    note(id);
    const late = Date.now();
    waits.length = 0;
    // One more where the last pause was so short that it ended in the same step of the clock.
    await passUntil(clock, () => stats().failed >= 60);
    await until("nothing is under way", () => to.requests.length === stats().failed + 2);
    assert.equal(waits.length, stats().failed);
    waits.forEach((wait, i) => assert.ok(wait >= 50 && wait <= Math.min(60_000, 1_000 * 2 ** i), `${i}: ${wait}`));
    assert.ok(Math.max(...waits) > 20_000, `${waits}`);
    assert.ok(clock.now() - began >= waits.slice(0, -1).reduce((a, b) => a + b));
    // The event has the time of this machine, of which the clock knows nothing.
    const { lag_ms } = stats();
    assert.ok(lag_ms >= clock.now() - late && lag_ms <= clock.now() - early, `${lag_ms}`);
    assert.ok(clock.timers <= 4, String(clock.timers));

    for (const name of ["b", "c", "d", "e"]) await instance(name);
    await passUntil(clock, () => stats().failed >= 100);
    to.answer = () => 204;
    const { sent } = stats();
    await passUntil(clock, () => stats().sent > sent, 100);
    // The first that works calls the others back.
    await until("all is sent", () => stats().sent === journal.last);
    assert.equal(logs.filter((line) => /does not take events/.test(line)).length, 1);
    assert.equal(logs.filter((line) => /takes events again/.test(line)).length, 1);
    await host.close();
    assert.equal(clock.timers, 0);
  },
);

// S10
test("a host that is restarted goes on where it was, whatever the order of the config", LIMIT, async (t) => {
  const [a, b] = [await receiver(t), await receiver(t)];
  const [first, second] = [{ url: a.url, types: ["test:noted", "start"] }, { url: b.url }];
  const one = await world(t, [first, second]);
  const { id } = await one.instance("web");
  const other = await one.instance("other");
  await b.when(({ taken }) => taken.length === 4);
  for (const each of [a, b]) each.answer = ({ body }) => body.instance === id && body.seq as number > 6 ? 500 : 204;
  for (let i = 0; i < 6; i++) one.note(i % 2 ? id : other.id);
  await until("all but those that are refused", () => one.stats(1).sent === 8 && one.stats(0).sent === 6);
  await one.host.close();
  assert.equal(one.clock.timers, 0);
  for (const each of [a, b]) each.answer = () => 204;
  const two = await world(t, [second, first], { before: one });
  two.note(id);
  const { last } = two.journal;
  await until("the rest", () => two.stats(0).backlog + two.stats(1).backlog === 0);
  assert.deepEqual(b.seqs.toSorted((x, y) => x - y), range(1, last));
  assert.equal(b.taken.length, last, "nothing is sent twice when the host closes properly");
  assert.deepEqual(a.seqs.toSorted((x, y) => x - y), [2, 4, ...range(5, 10), last]);
  assertOrdered(a.taken);
  assertOrdered(b.taken);
});

test(
  "a webhook keeps what waits for it when its types change, and begins anew after it was removed",
  LIMIT,
  async (t) => {
    const to = await receiver(t);
    to.answer = () => 500;
    const one = await world(t, [{ url: to.url }]);
    const { id } = await one.instance("web");
    for (const type of ["test:named", "test:noted", "test:named"]) one.note(id, type);
    await to.when(({ requests }) => requests.length === 1);
    await one.host.close();
    to.answer = () => 204;
    const two = await world(t, [{ url: to.url, types: ["test:named"] }], { before: one });
    two.note(id, "test:named");
    await until("all of its types", () => two.stats().backlog === 0);
    assert.deepEqual(to.seqs, [3, 5, 6]);
    assert.equal(two.stats().lost, 0);
    await two.host.close();

    const three = await world(t, [], { before: one });
    three.note(id);
    await three.host.close();
    const four = await world(t, [{ url: to.url }], { before: one });
    four.note(id);
    await until("the new one", () => four.stats().sent === 1);
    assert.deepEqual(to.seqs, [3, 5, 6, 8]);
  },
);

test("a receiver that is away for longer than events are kept is told once which are gone", LIMIT, async (t) => {
  const to = await receiver(t);
  const logs = capturedLogs(t);
  const { instance, note, clock, stats, journal } = await world(t, [{ url: to.url, max_backoff: "5s" }], {
    table: { max_rows: 20 },
  });
  const ids: string[] = [];
  for (let i = 0; i < 80; i++) ids.push((await instance(`i${i}`)).id); // more than there are lanes
  await until("all is sent", () => stats().sent === 160);
  to.answer = () => 500;
  for (let i = 0; i < 320; i++) note(ids[i % 80]);
  await passUntil(clock, () => journal.first === 461);
  assert.equal(stats().backlog, 320);
  to.answer = () => 204;
  await passUntil(clock, () => stats().backlog === 0);
  const later = note(ids[0]);
  await until("what comes later", () => stats().sent === 181);
  const resets = to.taken.filter(({ body }) => body.type === "reset");
  assert.equal(resets.length, 1);
  const { body, headers } = resets[0];
  assert.deepEqual(body.detail, { from: 161, to: 460, instances: null });
  assert.equal(body.summary, "Events 161 to 460 are gone from the journal and were not sent");
  assert.equal(headers["dormouse-delivery"], "reset-161-460");
  assert.equal(headers["dormouse-event"], "reset");
  assert.deepEqual([body.seq, body.instance, body.actor], [null, null, "system"]);
  const at = to.taken.indexOf(resets[0]);
  const after = to.taken.slice(at + 1).map(({ body }) => body.seq as number);
  assert.deepEqual(after.toSorted((a, b) => a - b), [...range(461, 480), later]);
  assert.equal(stats().lost, 300);
  assert.equal(logs.filter((line) => /are gone before webhook/.test(line)).length, 1);
});

test("events of one instance that are pruned while it is refused are told for it alone", LIMIT, async (t) => {
  const to = await receiver(t);
  const { instance, note, clock, stats, journal } = await world(t, [{ url: to.url, max_backoff: "5s" }], {
    table: { max_rows: 10 },
  });
  const [bad, good] = [(await instance("bad")).id, (await instance("good")).id];
  await until("all is sent", () => stats().sent === 4);
  to.answer = ({ body }) => body.instance === bad ? 400 : 204;
  for (let i = 0; i < 15; i++) for (const id of [bad, good]) note(id);
  await until("what is not refused is sent", () => stats().sent === 19);
  await passUntil(clock, () => journal.first === 25);
  await passUntil(clock, () => to.taken.some(({ body }) => body.type === "reset"));
  to.answer = () => 204;
  await passUntil(clock, () => stats().backlog === 0);
  const resets = to.taken.filter(({ body }) => body.type === "reset");
  assert.deepEqual(resets.map(({ body }) => body.detail), [{ from: 5, to: 24, instances: [bad] }]);
  const got = to.taken.filter(({ body }) => body.instance === bad).map(({ body }) => body.seq);
  assert.deepEqual(got, [1, 2, 25, 27, 29, 31, 33]);
  assert.equal(stats().lost, 10);
});

test("a reset names no event that comes after it, however rare those of an instance are", LIMIT, async (t) => {
  const to = await receiver(t);
  const { instance, note, clock, stats, journal } = await world(t, [{ url: to.url, max_backoff: "5s" }], {
    table: { max_rows: 10 },
  });
  const [often, seldom] = [(await instance("often")).id, (await instance("seldom")).id];
  await until("all is sent", () => stats().sent === 4);
  to.answer = () => 500;
  note(seldom);
  for (let i = 0; i < 30; i++) note(often);
  const last = note(seldom);
  await passUntil(clock, () => journal.first === last - 9);
  to.answer = () => 204;
  await passUntil(clock, () => stats().backlog === 0);
  const [reset] = to.taken.filter(({ body }) => body.type === "reset");
  const { from, to: end } = reset.body.detail as { from: number; to: number };
  assert.deepEqual([from, end], [5, journal.first - 1]);
  const after = to.taken.slice(to.taken.indexOf(reset) + 1).map(({ body }) => body.seq as number);
  assert.deepEqual(after.toSorted((a, b) => a - b), [...range(journal.first, last)]);
});

test("events that happened while the journal was off are told as gone", LIMIT, async (t) => {
  const to = await receiver(t);
  const one = await world(t, [{ url: to.url }]);
  const { id } = await one.instance("web");
  await until("all is sent", () => one.stats().sent === 2);
  await one.host.close();
  const without = await registryHost(t, { folder: one.folder, driver: one.driver });
  await without.hypervisor.stop(id, { actor: "test", cause: "request" });
  await without.host.close();
  const off = without.events.map(({ seq }) => seq);
  const two = await world(t, [{ url: to.url }], { before: one });
  const seq = two.note(id);
  await until("all is sent", () => two.stats().sent === 1);
  assert.deepEqual(to.taken.slice(2).map(({ body }) => [body.type, body.seq, body.detail]), [
    ["reset", null, { from: off[0], to: off.at(-1), instances: null }],
    ["test:noted", seq, {}],
  ]);
});

test("a host that closes lets a request under way end, and does not wait for one that hangs", LIMIT, async (t) => {
  const to = await receiver(t);
  const answers: (() => void)[] = [];
  to.answer = () => new Promise((resolve) => answers.push(() => resolve(204)));
  const one = await world(t, [{ url: to.url }]);
  const { id } = await one.instance("web");
  await to.when(({ open }) => open === 1);
  const closing = one.host.close();
  answers.splice(0).forEach((answer) => answer());
  await closing;
  const two = await world(t, [{ url: to.url }], { before: one });
  await to.when(({ open }) => open === 1);
  assert.deepEqual(to.requests.map(({ body }) => body.seq), [1, 2]);
  two.note(id);
  await two.host.close(); // the second is never answered
  assert.equal(two.clock.timers, 0);
  answers.splice(0).forEach((answer) => answer());
  to.answer = () => 204;
  const three = await world(t, [{ url: to.url }], { before: one });
  await until("all is sent", () => three.stats().backlog === 0);
  assert.deepEqual(to.requests.map(({ body }) => body.seq), [1, 2, 2, 3]);
});
