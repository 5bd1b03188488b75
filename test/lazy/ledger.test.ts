import assert from "node:assert/strict";
import { test } from "node:test";
import type { Journal, JournalQuery } from "../../main.ts";
import { metricsOf } from "../../plugins/lazy/counts.ts";
import { Ledger } from "../../plugins/lazy/ledger.ts";
import { KINDS } from "../../plugins/lazy/notes.ts";
import { settle } from "../clock.ts";
import { temporaryFolder } from "../helpers.ts";
import { ScriptedDriver } from "../hypervisor/scripted.ts";
import { killed, type Metrics, PERSON, type World, world } from "./world.ts";

const TYPES = Object.keys(KINDS);

/** What the journal says of an instance, counted from its first row on. */
function truth({ host }: World, id: string): Omit<Metrics, "leases_granted"> {
  const rows = host.use("journal").read({ after: 0, limit: 100_000, types: TYPES }).filter((row) =>
    row.instance_id === id
  );
  const of = (type: string) => rows.filter((row) => row.type === type);
  const statistics = (values: number[]) => ({
    last: values.at(-1) ?? null,
    mean: values.length ? values.reduce((sum, each) => sum + each) / values.length : null,
    min: values.length ? Math.min(...values) : null,
    max: values.length ? Math.max(...values) : null,
    count: values.length,
  });
  const last = rows.at(-1);
  return {
    starts: of("lazy_start").length,
    start_failures: of("lazy_start_failed").length,
    stops: of("lazy_stop").length,
    stop_failures: of("lazy_stop_failed").length,
    start_latency_ms: statistics(of("lazy_start").map(({ detail }) => detail.latency_ms as number)),
    idle_seconds: statistics(of("lazy_stop").map(({ detail }) => detail.idle_seconds as number)),
    last_event: last ? { type: last.type, ts: new Date(last.at).toISOString() } : null,
  };
}

function counted(made: World, name: string) {
  const { leases_granted, ...metrics } = made.shown(name).lifecycle_metrics;
  return { metrics, leases_granted };
}

/** A start and a stop, and now and then one that fails. */
async function cycle({ acquire, release, clock, driver }: World, name: string, n: number): Promise<void> {
  if (n % 5 === 0) {
    driver.script.start = () => Promise.reject(new Error("not now"));
    await assert.rejects(acquire(name));
    delete driver.script.start;
  }
  const { lease } = await acquire(name);
  await release(name, lease);
  if (n % 7 === 0) driver.script.stop = () => Promise.reject(new Error("not yet"));
  await clock.pass(10_000);
  delete driver.script.stop;
  await clock.pass(20_000);
}

test("the metrics of an instance are what its notes and leases come to", async (t) => {
  const made = await world(t);
  const { id } = await made.stopped();
  for (let n = 1; n <= 8; n++) await cycle(made, "web", n);
  const { metrics, leases_granted } = counted(made, "web");
  assert.deepEqual(metrics, truth(made, id));
  assert.deepEqual([metrics.starts, metrics.start_failures, metrics.stops, metrics.stop_failures], [8, 1, 9, 1]);
  assert.equal(leases_granted, 8);
});

// S8, S9: what is counted is never written for each event, and no crash changes what it comes to.
test("after kill -9 at any time the metrics are what the journal says, also when the rebuild is killed", async (t) => {
  const folder = temporaryFolder(t);
  const driver = new ScriptedDriver();
  const made = await world(t, { folder, driver });
  const ids = [(await made.stopped("a")).id, (await made.stopped("b")).id];
  for (let n = 1; n <= 60; n++) {
    await cycle(made, n % 3 ? "a" : "b", n);
    if (n % 12 !== 5) continue;
    let left = killed(t, folder);
    for (const _ of [1, 2, 3]) {
      const next = await world(t, { folder: left, driver: new ScriptedDriver(driver.machines), clock: made.clock });
      for (const [i, name] of ["a", "b"].entries()) {
        assert.deepEqual(counted(next, name).metrics, truth(made, ids[i]), `${name} after ${n} cycles`);
        for (const key of ["lifecycle_state", "lifecycle_metrics"] as const) {
          assert.deepEqual(next.shown(name)[key], made.shown(name)[key]);
        }
      }
      left = killed(t, left);
      await next.host.close();
    }
  }
});

test("a snapshot is written after a hundred notes, some minutes after the first, and at the end", async (t) => {
  const folder = temporaryFolder(t);
  const made = await world(t, { folder });
  const { db } = made.host.use("store");
  const snapshot = () => db.prepare("SELECT seq, pending FROM lazy_snapshot").get() as { seq: number; pending: number };
  const starts = (name: string) => {
    const { id } = made.hypervisor.resolve(name);
    const row = db.prepare("SELECT body FROM lazy_counts WHERE instance_id = ?").get(id);
    return row === undefined ? null : JSON.parse(row.body as string).starts;
  };
  await made.stopped();
  assert.deepEqual([snapshot().pending, starts("web")], [1, null]);
  // What is not about lazy instances is never read again.
  assert.equal(snapshot().seq, made.notes[0].seq - 1);
  await made.clock.pass(300_000);
  assert.deepEqual([snapshot().pending, starts("web")], [0, 0]);
  await made.instance("other", { enabled: false });
  made.driver.script.start = () => Promise.reject(new Error("not now"));
  for (let n = 0; n < 99; n++) await assert.rejects(made.acquire("web"));
  assert.equal(snapshot().pending, 99);
  assert.equal(snapshot().seq, made.notes[1].seq - 1);
  await assert.rejects(made.acquire("web"));
  assert.equal(snapshot().pending, 0);
  delete made.driver.script.start;
  await made.acquire("web");
  assert.deepEqual([snapshot().pending, starts("web")], [1, 0]);
  await made.host.close();
  const next = await world(t, { folder, driver: made.driver, clock: made.clock });
  const left = next.host.use("store").db.prepare("SELECT pending FROM lazy_snapshot").get()!;
  assert.deepEqual([left.pending, next.shown("web").lifecycle_metrics.starts], [0, 1]);
});

test("a rebuild reads the rows after the snapshot and no more, and comes to the same when it is done again", async (t) => {
  const made = await world(t);
  const { id } = await made.stopped();
  for (let n = 1; n <= 6; n++) await cycle(made, "web", n);
  const queries: (JournalQuery & { rows: number })[] = [];
  const journal = made.host.use("journal");
  const counting = {
    read(query: JournalQuery) {
      const rows = journal.read(query);
      queries.push({ ...query, rows: rows.length });
      return rows;
    },
  } as Journal;
  const { db } = made.host.use("store");
  const { pending, seq } = db.prepare("SELECT seq, pending FROM lazy_snapshot").get() as {
    pending: number;
    seq: number;
  };
  const [log, exists] = [made.host as never, () => true];
  const ledger = new Ledger({ store: made.host.use("store"), journal: counting, clock: made.clock, log, exists });
  ledger.rebuild();
  assert.deepEqual(queries, [{ after: seq, limit: pending, types: TYPES, rows: pending }]);
  const once = metricsOf(ledger.of(id), 0);
  assert.deepEqual(once, { ...truth(made, id), leases_granted: 0 });
  // The rows come again, and are known by their number.
  db.prepare("UPDATE lazy_snapshot SET seq = 0, pending = ?").run(pending);
  ledger.rebuild();
  assert.deepEqual(metricsOf(ledger.of(id), 0), once);
});

test("without a journal every note is counted on disk, and one that is turned on later adds nothing twice", async (t) => {
  const folder = temporaryFolder(t);
  const driver = new ScriptedDriver();
  const made = await world(t, { folder, driver, journal: false });
  await made.stopped();
  for (let n = 1; n <= 5; n++) await cycle(made, "web", n);
  const before = made.shown("web").lifecycle_metrics;
  assert.deepEqual([before.starts, before.start_failures, before.stops], [5, 1, 6]);
  for (const journal of [false, true, true, false]) {
    const left = killed(t, folder);
    const options = { folder: left, driver: new ScriptedDriver(driver.machines), clock: made.clock, journal };
    const next = await world(t, options);
    assert.deepEqual(next.shown("web").lifecycle_metrics, before);
    await cycle(next, "web", 1);
    assert.equal(next.shown("web").lifecycle_metrics.starts, 6);
    await next.host.close();
    const last = await world(t, { ...options, journal: true });
    assert.equal(last.shown("web").lifecycle_metrics.starts, 6);
    await last.host.close();
  }
});

test("what was in no snapshot when the journal was turned off is counted once it is on again", async (t) => {
  const folder = temporaryFolder(t);
  const driver = new ScriptedDriver();
  const made = await world(t, { folder, driver });
  await made.stopped();
  for (let n = 1; n <= 5; n++) await cycle(made, "web", n);
  const { starts } = made.shown("web").lifecycle_metrics;
  const left = killed(t, folder);
  const options = { folder: left, driver: new ScriptedDriver(driver.machines), clock: made.clock };
  const without = await world(t, { ...options, journal: false });
  for (let n = 1; n <= 2; n++) await cycle(without, "web", 1);
  await without.host.close();
  for (const _ of [1, 2]) {
    const again = await world(t, options);
    assert.equal(again.shown("web").lifecycle_metrics.starts, starts + 2);
    await again.host.close();
  }
});

test("the counts go with the instance, and one of the same name starts from zero", async (t) => {
  const folder = temporaryFolder(t);
  const made = await world(t, { folder });
  const { id } = await made.stopped();
  for (let n = 1; n <= 3; n++) await cycle(made, "web", n);
  await made.hypervisor.delete(id, PERSON);
  await settle();
  const again = await made.instance();
  const zero = metricsOf(undefined, 0);
  assert.deepEqual(made.shown("web").lifecycle_metrics, zero);
  const next = await world(t, { folder: killed(t, folder), driver: made.driver, clock: made.clock });
  assert.deepEqual(next.shown("web").lifecycle_metrics, zero);
  const { db } = next.host.use("store");
  assert.deepEqual(db.prepare("SELECT instance_id FROM lazy_counts").all().map((row) => row.instance_id), []);
  await made.clock.pass(300_000);
  assert.deepEqual([made.shown("web").lifecycle_metrics.stops, truth(made, again.id).stops], [1, 1]);
});
