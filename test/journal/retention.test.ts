import assert from "node:assert/strict";
import { test } from "node:test";
import { openStream } from "../api/support.ts";
import { ManualClock } from "../clock.ts";
import { capturedLogs, cleanup, temporaryFolder, until } from "../helpers.ts";
import { ScriptedDriver } from "../hypervisor/scripted.ts";
import { table } from "./table.ts";
import { Client, world } from "./world.ts";

const LIMITS = { max_age: 1_000, max_rows: 1_000_000, max_size: 1e12 };
const range = (from: number, to: number) => Array.from({ length: to - from + 1 }, (_, i) => from + i);

test("the oldest rows go, batch by batch, until no more than max_rows are left", async (t) => {
  const clock = new ManualClock(Date.now());
  const { create, note, journal, get } = await world(t, { clock, table: { max_rows: 50 } });
  const id = await create("web");
  while (journal.last < 320) note(id, "x");
  assert.deepEqual([journal.first, journal.stats().rows, journal.stats().pruned], [1, 320, 0]);
  const pruned: number[] = [];
  for (let i = 0; i < 5; i++) {
    await clock.pass(25);
    pruned.push(journal.stats().pruned);
  }
  // Small batches with pauses between them, so that nobody waits for long.
  assert.deepEqual(pruned, [100, 200, 270, 270, 270]);
  assert.deepEqual([journal.first, journal.last, journal.stats().rows], [271, 320, 50]);
  assert.deepEqual(journal.read({ after: 0, limit: 100 }).map(({ seq }) => seq), range(271, 320));
  note(id, "one more");
  await clock.pass(10_000);
  assert.deepEqual([journal.first, journal.stats().rows], [272, 50]);
  const { body } = await get("/events?format=json&since=17&limit=1");
  assert.deepEqual([body.reset, body.events[0].seq, body.first, body.last], [true, 272, 272, 321]);
  assert.equal((await get("/events?format=json&since=271&limit=1")).body.reset, undefined);
  // Who asks for no number in particular has lost nothing.
  assert.equal((await get("/events?format=json&limit=1")).body.reset, undefined);
});

// E6: an id that is older than what is kept gets one reset, with an id that can be gone on from.
test("rows go when they are older than max_age, which a restart of the host does not forget", async (t) => {
  const folder = temporaryFolder(t);
  const driver = new ScriptedDriver();
  const clock = new ManualClock(Date.now());
  const first = await world(t, { folder, driver, clock, table: { max_age: "1h" } });
  const id = await first.create("web");
  const { last } = first.journal;
  await clock.pass(50 * 60_000);
  assert.equal(first.journal.stats().rows, last);
  await clock.pass(11 * 60_000);
  assert.deepEqual([first.journal.first, first.journal.last, first.journal.stats().rows], [last + 1, last, 0]);
  await first.host.close();
  const { journal, api, note, host } = await world(t, { folder, driver, table: { max_age: "1h" } });
  assert.deepEqual([journal.first, journal.last, journal.stats().rows], [last + 1, last, 0]);
  const client = (lastId: string) => {
    const made = new Client(`${api.url}/events`, { lastId });
    cleanup(t).defer(() => made.leave());
    return made;
  };
  const [old, current] = [client(String(last - 1)), client(String(last))];
  await Promise.all([old.got(1), current.until(({ status }) => status === 200)]);
  note(id, "new");
  await Promise.all([old.got(2), current.got(1)]);
  assert.deepEqual(old.messages.map(({ event, id }) => [event, id]), [["reset", `${last}`], [
    "test:note",
    `${last + 1}`,
  ]]);
  assert.deepEqual(JSON.parse(old.messages[0].data), { last_event_id: `${last - 1}`, first: last + 1, last });
  assert.deepEqual(current.messages.map(({ event }) => event), ["test:note"]);
  // Right after the reset too it can go on where it was.
  const again = client(old.messages[0].id);
  await again.got(1);
  assert.equal(again.messages[0].event, "test:note");
  await host.close();
});

test("rows go when together they are larger than max_size, and the last one never", async (t) => {
  const { rows, write, kept } = await table(t);
  const limits = { ...LIMITS, max_size: 10_000 };
  for (let i = 0; i < 20; i++) write({ at: 10, padding: "x".repeat(1000) });
  assert.ok(rows.prune(limits, 10) > 0);
  assert.ok(kept().length >= 6 && kept().length <= 9, `${kept().length}`);
  assert.equal(rows.first, kept()[0]);
  write({ at: 10, padding: "x".repeat(20_000) });
  rows.prune(limits, 10);
  assert.deepEqual([kept(), rows.count], [[21], 1]);
  assert.equal(rows.prune(limits, 10), 0);
});

test("prune() goes by the order of the rows where the clock has stepped", async (t) => {
  const { rows, write, kept } = await table(t);
  for (const at of [100, 200, 9_000, 300, 2_500, 400, 2_600]) write({ at });
  // One of the future goes with older ones behind it; one of the past stays for as long as younger ones before it.
  assert.equal(rows.prune(LIMITS, 3_000), 4);
  assert.deepEqual([kept(), rows.first], [[5, 6, 7], 5]);
  assert.equal(rows.prune(LIMITS, 3_000), 0);
  assert.equal(rows.prune(LIMITS, 3_550), 2);
  assert.deepEqual([kept(), rows.first], [[7], 7]);
  // Only rows of the future: the clock has been set right, and they are of no known age.
  assert.equal(rows.prune(LIMITS, 1_000), 0);
});

test("pruning that fails is said, and tried again", async (t) => {
  const logs = capturedLogs(t);
  const clock = new ManualClock(Date.now());
  const { create, journal, store } = await world(t, { clock, table: { max_rows: 1 } });
  await create("web");
  store.db.exec("CREATE TRIGGER full BEFORE DELETE ON journal BEGIN SELECT RAISE(ABORT, 'disk full'); END");
  await clock.pass(50);
  assert.deepEqual([journal.first, journal.stats().rows], [1, 2]);
  assert.ok(logs.includes("error: Pruning the journal failed: disk full"), logs.join("\n"));
  store.db.exec("DROP TRIGGER full");
  await clock.pass(10_000);
  assert.deepEqual([journal.first, journal.stats().rows], [2, 1]);
});

// E1: what is gone before a client has got it is not passed over in silence.
test("a client that retention overtakes in the middle of a replay gets a reset", { timeout: 300_000 }, async (t) => {
  const clock = new ManualClock(Date.now());
  const { api, create, note, journal } = await world(t, { clock, table: { max_rows: 20 } });
  const id = await create("web");
  while (journal.last < 100) note(id, "x", { padding: "x".repeat(300_000) });
  const slow = await openStream(t, `${api.url}/events?since=0`);
  await until("it is being sent to", () => clock.timers > 1);
  const expected: number[] = [];
  for (let seq = 1; seq <= 5; seq++) expected.push(seq);
  for (const seq of expected) assert.equal((await slow.event())!.id, String(seq));
  await clock.pass(100);
  assert.equal(journal.first, 81);
  let seq = 5;
  let resets = 0;
  while (seq < 100) {
    const message = (await slow.event())!;
    if (message.event === "reset") {
      assert.deepEqual(JSON.parse(message.data!), { last_event_id: String(seq), first: 81, last: 100 });
      assert.equal(message.id, "80");
      seq = 80;
      resets++;
    } else assert.equal(message.id, String(++seq));
  }
  assert.equal(resets, 1);
});
