import assert from "node:assert/strict";
import { copyFileSync, existsSync, readFileSync, statSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { StatementSync } from "node:sqlite";
import { test } from "node:test";
import { execa } from "execa";
import type { Plugin } from "../../main.ts";
import hypervisor from "../../plugins/hypervisor/mod.ts";
import journal from "../../plugins/journal/mod.ts";
import store from "../../plugins/store.ts";
import { cleanup, RUNTIME, startWith, temporaryFolder } from "../helpers.ts";
import { POINTS, stormy } from "./storm.ts";
import { judge, type Verdict } from "./verdict.ts";

const LIVES = 4;
const tables = { hypervisor: { default_driver: "scripted" } };

/** A host in this process that a storm goes through; `at` is called before and after each statement. */
async function stormed(t: Parameters<typeof startWith>[0], at: (data: string) => void) {
  const given: Parameters<typeof stormy>[0] = {};
  const folder = temporaryFolder(t);
  const plugins = [store, hypervisor, journal, stormy(given, () => {})] as Plugin[];
  const host = await startWith(t, plugins, { tables, folder });
  const data = join(folder, "data");
  const { db } = given.host!.use("store");
  db.exec("PRAGMA wal_autocheckpoint = 0");
  db.prepare("PRAGMA wal_checkpoint(TRUNCATE)").get();
  // The store hands SQL to the database, and the plugins have their statements: there is no other way in.
  const { run } = StatementSync.prototype;
  const exec = db.exec.bind(db);
  cleanup(t).defer(() => void (StatementSync.prototype.run = run));
  StatementSync.prototype.run = function (this: StatementSync, ...values: Parameters<typeof run>) {
    at(data);
    const result = run.apply(this, values);
    at(data);
    return result;
  } as typeof run;
  db.exec = (sql) => {
    at(data);
    exec(sql);
    at(data);
  };
  await given.storm!(LIVES);
  StatementSync.prototype.run = run;
  db.exec = exec;
  return { host, data };
}

/** The files as a process that dies now leaves them; the index of the log (-shm) is made anew from it. */
function leave(data: string, target: string): void {
  for (const suffix of ["", "-wal"]) {
    const file = join(data, `dormouse.db${suffix}`);
    if (existsSync(file)) copyFileSync(file, `${target}${suffix}`);
    else writeFileSync(`${target}${suffix}`, "");
  }
}

// The issue's own words: between any two statements of a commit. What a process leaves that is killed there is what the
// files hold at that time, so a copy of them is judged in its place: for every place there is.
test(
  "a host that dies between any two statements leaves no change without its event, and no event without its change",
  {
    timeout: 540_000,
  },
  async (t) => {
    const target = join(temporaryFolder(t), "dormouse.db");
    const seen = new Set<number>();
    let places = 0;
    const { data } = await stormed(t, (data) => {
      leave(data, target);
      seen.add(judge(target)!.sequence);
      places++;
    });
    leave(data, target);
    const { sequence } = judge(target)!;
    assert.ok(places > sequence * 6, `${places} places`);
    // Each commit was seen as not there yet and as there.
    assert.deepEqual([...seen].sort((a, b) => a - b), Array.from({ length: sequence + 1 }, (_, i) => i));
  },
);

// S9: a power cut loses what the disk was not told to keep, so the log may end anywhere, in the middle of a page too.
test(
  "whatever a power cut leaves of the log, changes and events are the same story",
  { timeout: 540_000 },
  async (t) => {
    const target = join(temporaryFolder(t), "dormouse.db");
    const { data } = await stormed(t, () => {});
    leave(data, target);
    const log = readFileSync(`${target}-wal`);
    // https://www.sqlite.org/fileformat2.html#the_write_ahead_log: a header of 32 bytes, frames of a page and 24 more.
    const frame = 4096 + 24;
    const sequences: number[] = [];
    for (let frames = 0; 32 + frames * frame <= log.length; frames++) {
      for (const torn of [0, 11, 24, 2000]) {
        leave(data, target);
        writeFileSync(`${target}-wal`, log.subarray(0, 32 + frames * frame + torn));
        sequences.push(judge(target)!.sequence);
      }
    }
    assert.deepEqual(sequences, sequences.toSorted((a, b) => a - b));
    assert.equal(sequences.at(0), 0);
    assert.equal(sequences.at(-1), judge(join(data, "dormouse.db"))!.sequence);
  },
);

test("every commit is told to stay: the log is synced by each", async (t) => {
  const given: Parameters<typeof stormy>[0] = {};
  await startWith(t, [store, hypervisor, journal, stormy(given, () => {})] as Plugin[], { tables });
  const { db } = given.host!.use("store");
  // 2 is FULL: https://www.sqlite.org/pragma.html#pragma_synchronous
  assert.deepEqual(Object.values(db.prepare("PRAGMA synchronous").get()!), [2]);
  assert.deepEqual(Object.values(db.prepare("PRAGMA journal_mode").get()!), ["wal"]);
});

test(
  "a host that is killed with SIGKILL again and again, anywhere, goes on without a gap",
  { timeout: 600_000 },
  async (t) => {
    const folder = temporaryFolder(t);
    const file = join(folder, "dormouse.db");
    let before: Verdict = { sequence: 0, instances: 0 };
    const [command, ...flags] = RUNTIME;
    const run = async (point: string, count: number, killAfter?: number) => {
      const script = join(import.meta.dirname!, "storm.ts");
      const child = execa(command, [...flags, script, folder, point, String(count)], {
        reject: false,
        stdin: "ignore",
      });
      const timer = killAfter === undefined
        ? undefined
        : setTimeout(() => process.kill(child.pid!, "SIGKILL"), killAfter);
      const { signal, stderr, stdout } = await child;
      clearTimeout(timer);
      assert.equal(signal, "SIGKILL", stderr);
      const verdict = judge(file);
      assert.ok((verdict?.sequence ?? 0) >= before.sequence, `${point} ${count}`);
      if (stdout.includes("storm")) before = verdict!;
    };
    for (const [i, point] of POINTS.entries()) await run(point, 3 + i * 2);
    // At a time of nobody's choosing, also while the host starts.
    for (let i = 0; i < 5; i++) await run("nowhere", 0, 300 + Math.random() * 900);
    assert.ok(before.sequence > 50, `${before.sequence} events`);
    assert.ok(statSync(file).size > 0);
  },
);
