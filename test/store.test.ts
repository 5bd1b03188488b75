import assert from "node:assert/strict";
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { existsSync, readdirSync, statSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { createInterface } from "node:readline";
import { test, type TestContext } from "node:test";
import * as fc from "fast-check";
import { DormouseError, type Store } from "../main.ts";
import storePlugin from "../plugins/store.ts";
import { cleanup, RUNTIME, startWith, temporaryFolder } from "./helpers.ts";

const start = (t: TestContext, folder: string) => startWith(t, [storePlugin], { folder });

async function storeOf(t: TestContext): Promise<Store> {
  return (await start(t, temporaryFolder(t))).use("store");
}

/** A host in a process of its own that writes without end. */
function writerIn(t: TestContext, folder: string): ChildProcess {
  const file = join(folder, "config.toml");
  writeFileSync(file, 'data_dir = "data"\n[plugins.store]\n');
  const [command, ...flags] = RUNTIME;
  const script = join(import.meta.dirname!, "store-writer.ts");
  const writer = spawn(command, [...flags, script, file], { stdio: ["ignore", "pipe", "inherit"] });
  cleanup(t).defer(() => void writer.kill("SIGKILL"));
  return writer;
}

async function acknowledgements(writer: ChildProcess, acknowledged: number[], count: number): Promise<void> {
  for await (const line of createInterface({ input: writer.stdout! })) {
    acknowledged.push(Number(line));
    if (acknowledged.length === count) break;
  }
}

const coded = (code: string, message: RegExp) => (error: unknown) => {
  assert.ok(error instanceof DormouseError, String(error));
  assert.equal(error.code, code);
  assert.match(error.message, message);
  return true;
};

const rows = (store: Store) => store.db.prepare("SELECT n FROM t ORDER BY n").all().map(({ n }) => n as number);

test("store makes a data_dir that only its user can read, with a durable WAL database", async (t) => {
  const folder = temporaryFolder(t);
  const host = await start(t, folder);
  const { db } = host.use("store");
  const pragma = (name: string) => Object.values(db.prepare(`PRAGMA ${name}`).get()!)[0];
  assert.equal(statSync(join(folder, "data")).mode & 0o777, 0o700);
  assert.equal(statSync(join(folder, "data", "dormouse.db")).mode & 0o777, 0o600);
  assert.deepEqual(
    [pragma("journal_mode"), pragma("synchronous"), pragma("foreign_keys"), pragma("busy_timeout")],
    ["wal", 2, 1, 5000],
  );
  await host.close();
  assert.deepEqual(readdirSync(join(folder, "data")).sort(), ["dormouse.db", "dormouse.lock"]);
});

test("store refuses a data_dir that a host of the same process uses, until that one closes", async (t) => {
  const folder = temporaryFolder(t);
  const first = await start(t, folder);
  const taken = coded("store_locked", new RegExp(`Cannot use data_dir "${folder}/data": .* pid ${process.pid}`));
  await assert.rejects(start(t, folder), taken);
  await assert.rejects(start(t, folder), taken, "the refused one must not have freed the lock");
  first.use("store").migrate("test", ["CREATE TABLE t (n INTEGER)"]);
  await first.close();
  await start(t, folder);
});

test("store refuses a data_dir that another process uses, naming its pid, until that one is killed", async (t) => {
  const folder = temporaryFolder(t);
  const other = writerIn(t, folder);
  await acknowledgements(other, [], 1);
  await assert.rejects(start(t, folder), coded("store_locked", new RegExp(`pid ${other.pid}`)));
  other.kill("SIGKILL");
  await once(other, "exit");
  await start(t, folder);
});

test("migrate() runs each step once, for each owner apart", async (t) => {
  const folder = temporaryFolder(t);
  const steps = ["CREATE TABLE t (n INTEGER)", "INSERT INTO t VALUES (1); INSERT INTO t VALUES (2)"];
  const first = await start(t, folder);
  first.use("store").migrate("one", steps.slice(0, 1));
  first.use("store").migrate("two", ["CREATE TABLE u (n INTEGER)"]);
  first.use("store").migrate("one", steps);
  await first.close();
  const store = (await start(t, folder)).use("store");
  store.migrate("one", steps);
  assert.deepEqual(rows(store), [1, 2]);
  assert.throws(() => store.migrate("one", steps.slice(0, 1)), coded("store_newer", /"one".*step 2.*knows 1/));
  assert.throws(() => store.migrate("one", [steps[0], "SELECT 1"]), coded("store_changed", /"one": step 1 /));
  store.migrate("two", ["CREATE TABLE u (n INTEGER)", "DROP TABLE u"]);
});

test("migrate() leaves nothing of a step that fails, and goes on from there once it is repaired", async (t) => {
  const store = await storeOf(t);
  const [good, bad] = ["CREATE TABLE t (n INTEGER)", "INSERT INTO t VALUES (1); INSERT INTO nowhere VALUES (1)"];
  assert.throws(() => store.migrate("test", [good, bad]), /nowhere/);
  assert.deepEqual(rows(store), []);
  store.migrate("test", [good, "INSERT INTO t VALUES (7)"]);
  assert.deepEqual(rows(store), [7]);
});

test("transaction() undoes everything when its work throws, returns a promise, or does not commit", async (t) => {
  const store = await storeOf(t);
  store.migrate("test", [
    "CREATE TABLE t (n INTEGER PRIMARY KEY)",
    "CREATE TABLE u (n INTEGER REFERENCES t DEFERRABLE INITIALLY DEFERRED)",
  ]);
  const insert = (table: string, n: number) => store.db.prepare(`INSERT INTO ${table} VALUES (?)`).run(n);
  assert.equal(store.transaction(() => (insert("t", 1), "result")), "result");
  const failures: [string, () => unknown, RegExp][] = [
    ["a throw", () => (insert("t", 2), assert.fail("on purpose")), /on purpose/],
    ["a promise", () => (insert("t", 2), Promise.resolve()), /returned a promise/],
    ["a COMMIT that is refused", () => (insert("t", 2), insert("u", 99)), /FOREIGN KEY/],
    ["a transaction that is gone", () => (insert("t", 2), store.db.exec("ROLLBACK")), /no transaction is active/],
    ["an inner one", () => (insert("t", 2), store.transaction(() => assert.fail("within"))), /within/],
  ];
  for (const [what, work, message] of failures) {
    assert.throws(() => store.transaction(work), message, what);
    assert.deepEqual(rows(store), [1], what);
    assert.equal(store.db.isTransaction, false, what);
  }
});

test("transaction() does to the tables what a copy of a list does, however it is nested", async (t) => {
  interface Work {
    insert: number;
    throws: boolean;
    inner: Work[];
  }
  const { work } = fc.letrec<{ work: Work; list: Work[] }>((tie) => ({
    work: fc.record({
      insert: fc.nat(1e9),
      throws: fc.boolean(),
      inner: tie("list"),
    }),
    list: fc.oneof({ maxDepth: 4 }, fc.constant<Work[]>([]), fc.array(tie("work"), { maxLength: 3 })),
  }));
  const store = await storeOf(t);
  store.migrate("test", ["CREATE TABLE t (n INTEGER)"]);
  const insert = store.db.prepare("INSERT INTO t VALUES (?)");
  const inDatabase = ({ throws, ...work }: Work): void => {
    const stopped = new Error("stop");
    try {
      store.transaction(() => {
        insert.run(work.insert);
        for (const inner of work.inner) inDatabase(inner);
        if (throws) throw stopped;
      });
    } catch (error) {
      if (error !== stopped) throw error;
    }
  };
  const inModel = ({ insert, throws, inner }: Work): number[] => throws ? [] : [insert, ...inner.flatMap(inModel)];
  fc.assert(
    fc.property(work, (work) => {
      store.db.exec("DELETE FROM t");
      inDatabase(work);
      assert.deepEqual(rows(store), inModel(work).sort((a, b) => a - b));
    }),
    { numRuns: 60 },
  );
});

// S9: nothing that was acknowledged is lost, and nothing is there by half.
test("store keeps every acknowledged transaction when its host is killed at any moment", async (t) => {
  const folder = temporaryFolder(t);
  const acknowledged: number[] = [];
  for (let round = 0; round < 4; round++) {
    const writer = writerIn(t, folder);
    await acknowledgements(writer, acknowledged, acknowledged.length + 1 + Math.floor(Math.random() * 200));
    writer.kill("SIGKILL");
    await once(writer, "exit");
    assert.ok(existsSync(join(folder, "data", "dormouse.db-wal")), "the kill came before the checkpoint of a close");
  }
  const { db } = (await start(t, folder)).use("store");
  const [a, b] = ["a", "b"].map((table) => db.prepare(`SELECT n FROM ${table} ORDER BY n`).all().map(({ n }) => n));
  const missing = acknowledged.filter((n) => !new Set(a).has(n));
  assert.deepEqual(missing, []);
  assert.deepEqual(a, b);
  assert.deepEqual(a, a.map((_, index) => index + 1));
  assert.equal(db.prepare("PRAGMA integrity_check").get()!.integrity_check, "ok");
});

test("store names the file when the database is not one", async (t) => {
  const folder = temporaryFolder(t);
  await (await start(t, folder)).close();
  writeFileSync(
    join(folder, "data", "dormouse.db"),
    "this is no database, however much one would like it to be".repeat(9),
  );
  await assert.rejects(
    start(t, folder),
    coded("plugin_failed", /Cannot open ".*dormouse\.db": file is not a database/),
  );
  await assert.rejects(start(t, folder), /file is not a database/, "and the lock is free again");
});
