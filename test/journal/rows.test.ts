import assert from "node:assert/strict";
import { test } from "node:test";
import * as v from "valibot";
import { definePlugin, type JournalRow, type LifecycleEvent, type Note } from "../../main.ts";
import { capturedLogs, temporaryFolder, until } from "../helpers.ts";
import { gate, ORIGIN, ScriptedDriver } from "../hypervisor/scripted.ts";
import { settle } from "../clock.ts";
import { world } from "./world.ts";

const all = (journal: { read(query: { after: number; limit: number }): JournalRow[] }) =>
  journal.read({ after: 0, limit: 1_000_000 });

// E8: what somebody asked for and what a plugin did can be told apart, in every row.
test("every change and every note is a row, as it was told of", async (t) => {
  const told: (LifecycleEvent | Note)[] = [];
  const ears = definePlugin({
    name: "ears",
    setup({ hooks }) {
      hooks.on("instance:event", (event) => void told.push(event));
      hooks.on("note:event", (note) => void told.push(note));
    },
  });
  const { hypervisor, journal, create, note } = await world(t, { plugins: [ears] });
  const id = await create("web");
  note(id, "something", { n: 1 });
  await hypervisor.standby(id, { actor: "conntrack-standby", cause: "idle", detail: { idle_for: "5m0s" } });
  hypervisor.note(id, { type: "lazy_start", origin: { actor: "lazy", cause: "lease" }, summary: "Started" });
  await hypervisor.restore(id, ORIGIN);
  await hypervisor.delete(id, ORIGIN);
  await until("all are told", () => told.length === journal.last);
  const expected = told.map((event): JournalRow => {
    const { seq, instance_id, instance: { name: instance_name }, at, actor, cause, detail } = event;
    const own = "action" in event
      ? { type: event.action, event: event.action, from: event.from, to: event.to, summary: null }
      : { type: event.type, event: event.event, from: null, to: null, summary: event.summary };
    return { seq, instance_id, instance_name, at, actor, cause, detail: { ...detail }, ...own };
  });
  assert.deepEqual(all(journal), expected);
  assert.deepEqual(expected.map(({ seq }) => seq), expected.map((_, i) => i + 1));
  const standby = expected.find(({ type }) => type === "standby")!;
  assert.deepEqual([standby.actor, standby.cause, standby.detail], ["conntrack-standby", "idle", { idle_for: "5m0s" }]);
  const lazy = expected.find(({ type }) => type === "lazy_start")!;
  assert.deepEqual([lazy.event, lazy.actor], ["container.lazy_started", "lazy"]);
  assert.equal(journal.stats().rows, expected.length);
});

test("a change that is rolled back leaves no row, and its number to the next", async (t) => {
  let refuse = false;
  const late = definePlugin({
    name: "late",
    setup({ hooks }) {
      const hook = () => {
        if (refuse) throw new Error("no");
      };
      hooks.commit("instance:commit", hook, { priority: -Infinity });
      hooks.commit("note:commit", hook, { priority: -Infinity });
    },
  });
  const { hypervisor, journal, create, note } = await world(t, { plugins: [late] });
  const id = await create("web");
  const before = all(journal);
  const { last } = journal;
  refuse = true;
  await assert.rejects(hypervisor.update(id, { tags: { a: "b" } }, ORIGIN), /no/);
  assert.throws(() => note(id, "lost"), /no/);
  assert.deepEqual([all(journal), journal.last, journal.stats().rows], [before, last, before.length]);
  refuse = false;
  assert.equal(note(id, "kept").seq, last + 1);
  assert.deepEqual(all(journal).slice(before.length).map(({ summary }) => summary), ["kept"]);
});

test("read() begins above a number, up to a limit, of one instance and of some types", async (t) => {
  const { hypervisor, journal, create, note } = await world(t);
  const [a, b] = [await create("a"), await create("b")];
  for (let i = 0; i < 5; i++) {
    note(a, `a${i}`);
    note(b, `b${i}`);
  }
  hypervisor.note(a, { type: "lazy_start", origin: ORIGIN, summary: "Started" });
  const rows = all(journal);
  const same = (query: Parameters<typeof journal.read>[0], wanted: (row: JournalRow) => boolean) =>
    assert.deepEqual(journal.read(query), rows.filter(wanted).slice(0, query.limit));
  same({ after: 0, limit: 3 }, () => true);
  same({ after: 4, limit: 100 }, ({ seq }) => seq > 4);
  same({ after: rows.length, limit: 100 }, () => false);
  same({ after: 2, limit: 4, instance: b }, ({ seq, instance_id }) => seq > 2 && instance_id === b);
  same({ after: 0, limit: 100, types: ["create", "start"] }, ({ type }) => type === "create" || type === "start");
  same(
    { after: 0, limit: 2, types: ["test:note"], instance: a },
    (row) => row.type === "test:note" && row.instance_id === a,
  );
  for (const type of ["lazy_start", "container.lazy_started"]) {
    same({ after: 0, limit: 100, types: [type] }, (row) => row.type === "lazy_start");
  }
  same({ after: 0, limit: 100, types: [] }, () => false);
});

test("follow() calls once rows can be read, also when another listener throws", async (t) => {
  const logs = capturedLogs(t);
  const { journal, create, note, store } = await world(t);
  const id = await create("web");
  await settle();
  const seen: number[] = [];
  using _broken = journal.follow(() => {
    throw new Error("broken");
  });
  const listener = () => {
    assert.equal(store.db.isTransaction, false);
    seen.push(all(journal).length);
  };
  const subscription = journal.follow(listener);
  const { last } = journal;
  note(id, "one");
  await settle();
  note(id, "two");
  note(id, "three");
  await settle();
  // Commits of one turn are told of together.
  assert.deepEqual(seen, [last + 1, last + 3]);
  assert.ok(logs.includes("error: Telling of new rows failed: broken"), logs.join("\n"));
  subscription[Symbol.dispose]();
  note(id, "four");
  await settle();
  assert.equal(seen.length, 2);
});

test("first and last are 1 and 0 before anything has happened", async (t) => {
  const { journal } = await world(t);
  assert.deepEqual([journal.first, journal.last, journal.stats().rows], [1, 0, 0]);
});

test("a journal that is turned on over a history begins after it", async (t) => {
  const folder = temporaryFolder(t);
  const driver = new ScriptedDriver();
  const before = await world(t, { folder, driver, table: null });
  const id = await before.create("web");
  before.note(id, "unseen");
  await before.host.close();
  const { journal, note, host } = await world(t, { folder, driver });
  assert.deepEqual([journal.first, journal.last, journal.stats().rows], [4, 3, 0]);
  assert.equal(note(id, "seen").seq, 4);
  assert.deepEqual([journal.first, journal.last], [4, 4]);
  await host.close();
  const again = await world(t, { folder, driver });
  assert.deepEqual([again.journal.first, again.journal.last], [4, 4]);
});

test("a journal that was off for a while keeps what it has, and says from where on nothing is missing", async (t) => {
  const folder = temporaryFolder(t);
  const driver = new ScriptedDriver();
  const one = await world(t, { folder, driver });
  const id = await one.create("web");
  one.note(id, "3");
  await one.host.close();
  const two = await world(t, { folder, driver, table: null });
  two.note(id, "4");
  two.note(id, "5");
  await two.host.close();
  const { journal, note } = await world(t, { folder, driver });
  note(id, "6");
  assert.deepEqual([journal.first, journal.last], [6, 6]);
  assert.deepEqual(all(journal).map(({ seq }) => seq), [1, 2, 3, 6]);
});

// What is under way when the host closes ends after the journal has closed, and before the registry has.
test("an action that ends while the host closes has its row", async (t) => {
  const folder = temporaryFolder(t);
  const driver = new ScriptedDriver();
  const { host, hypervisor, create, journal } = await world(t, { folder, driver });
  const id = await create("web");
  const { arrived, open, script } = gate();
  driver.script.stop = script;
  const stopped = hypervisor.stop(id, ORIGIN);
  await arrived;
  const closed = host.close();
  await until("the journal is closed", () => host.use("journal") === undefined);
  open();
  await stopped;
  await closed;
  assert.equal(journal.first, 1);
  const again = await world(t, { folder, driver });
  assert.equal(again.journal.first, 1);
  assert.deepEqual(all(again.journal).map(({ type }) => type), ["create", "start", "state", "stop"]);
});

test("a plugin that cannot show its field does not undo a change", async (t) => {
  const logs = capturedLogs(t);
  const broken = definePlugin({
    name: "broken",
    requires: ["hypervisor"],
    setup(host) {
      host.use("hypervisor").extend({
        field: "broken",
        schema: v.string(),
        present: () => {
          throw new Error("no idea");
        },
      });
    },
  });
  const { create, store } = await world(t, { plugins: [broken] });
  const id = await create("web");
  const shown = store.db.prepare("SELECT shown FROM journal ORDER BY id LIMIT 1").get()!.shown as string;
  assert.deepEqual(JSON.parse(shown), { id, name: "web", state: "Created" });
  assert.ok(logs.includes(`error: Showing instance ${id} failed: no idea`), logs.join("\n"));
});
