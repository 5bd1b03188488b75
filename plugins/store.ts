/** The plugin `store`: one SQLite file, its migrations, and the lock that keeps a second host off the same data_dir. */
import { createHash } from "node:crypto";
import { closeSync, existsSync, fsyncSync, mkdirSync, openSync, rmSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import process from "node:process";
import { DatabaseSync } from "node:sqlite";
import { definePlugin, DormouseError, type Store } from "../main.ts";
import { messageOf } from "./shared/errors.ts";
import { readIfThere } from "./shared/files.ts";

export default definePlugin({
  name: "store",
  provides: ["store"],
  setup(host) {
    makeFolder(host.dataDir);
    host.defer(lock(host.dataDir));
    const db = open(join(host.dataDir, "dormouse.db"));
    host.defer(() => {
      // PASSIVE, for a person who reads the file with another program must not hold up the closing.
      db.exec("PRAGMA wal_checkpoint(PASSIVE)");
      db.close();
    });
    host.provide("store", new SqliteStore(db));
  },
});

function makeFolder(path: string): void {
  const first = mkdirSync(path, { recursive: true, mode: 0o700 });
  // A new folder is safe from a power cut only once the folder that holds it is synced; SQLite does so for its files.
  for (let made = path; first !== undefined && made.length >= first.length; made = dirname(made)) {
    const parent = openSync(dirname(made), "r");
    fsyncSync(parent);
    closeSync(parent);
  }
}

/**
 * Holds `dormouse.lock` as a SQLite lock, which the kernel frees when the process dies however it dies. The pid is
 * beside it in a file of its own: reading the locked file from this process would drop the lock (fcntl(2)).
 */
function lock(dataDir: string): () => void {
  const pidFile = join(dataDir, "dormouse.pid");
  const db = new DatabaseSync(join(dataDir, "dormouse.lock"));
  try {
    db.exec("PRAGMA busy_timeout = 0; PRAGMA locking_mode = EXCLUSIVE; BEGIN EXCLUSIVE");
  } catch (error) {
    db.close();
    if (!/locked/.test(messageOf(error))) throw error;
    const pid = readIfThere(pidFile)?.trim();
    const holder = pid ? `the host with pid ${pid}` : "another host";
    throw new DormouseError("store_locked", `Cannot use data_dir "${dataDir}": it is in use by ${holder}`);
  }
  writeFileSync(pidFile, `${process.pid}\n`);
  return () => {
    rmSync(pidFile, { force: true });
    db.close();
  };
}

function open(file: string): DatabaseSync {
  // It holds environments of instances, so secrets. SQLite gives its other files the mode of this one.
  if (!existsSync(file)) closeSync(openSync(file, "a", 0o600));
  const db = new DatabaseSync(file);
  try {
    db.exec(`
      PRAGMA busy_timeout = 5000;
      PRAGMA journal_mode = WAL;
      PRAGMA synchronous = FULL;
      PRAGMA foreign_keys = ON;
      PRAGMA journal_size_limit = 16777216;
      CREATE TABLE IF NOT EXISTS migrations (
        owner TEXT NOT NULL,
        step INTEGER NOT NULL,
        checksum TEXT NOT NULL,
        applied_at INTEGER NOT NULL,
        PRIMARY KEY (owner, step)
      ) STRICT, WITHOUT ROWID;
    `);
    return db;
  } catch (error) {
    db.close();
    throw new Error(`Cannot open "${file}": ${messageOf(error)}`, { cause: error });
  }
}

class SqliteStore implements Store {
  readonly db: DatabaseSync;
  #depth = 0;
  #undos: (() => void)[] = [];

  constructor(db: DatabaseSync) {
    this.db = db;
  }

  migrate(owner: string, steps: readonly string[]): void {
    const applied = this.db.prepare("SELECT checksum FROM migrations WHERE owner = ? ORDER BY step").all(owner);
    if (applied.length > steps.length) {
      const message = `Cannot use the tables of "${owner}": they are at step ${applied.length}, made by a newer ` +
        `version, and this one knows ${steps.length}`;
      throw new DormouseError("store_newer", message);
    }
    steps.forEach((step, index) => {
      const checksum = createHash("sha256").update(step).digest("hex");
      if (index >= applied.length) this.#apply(owner, index, step, checksum);
      else if (applied[index].checksum !== checksum) {
        const message = `Cannot use the tables of "${owner}": step ${index} has changed since it was applied`;
        throw new DormouseError("store_changed", message);
      }
    });
  }

  #apply(owner: string, index: number, step: string, checksum: string): void {
    this.transaction(() => {
      this.db.exec(step);
      this.db.prepare("INSERT INTO migrations VALUES (?, ?, ?, ?)").run(owner, index, checksum, Date.now());
    });
  }

  transaction<T>(work: () => T): T {
    // An inner one is a savepoint: when its throw is caught on the way out, nothing of it stays in the outer one.
    const [begin, commit, undo] = this.#depth === 0
      ? ["BEGIN IMMEDIATE", "COMMIT", "ROLLBACK"]
      : ["SAVEPOINT inner", "RELEASE inner", "ROLLBACK TO inner; RELEASE inner"];
    this.db.exec(begin);
    this.#depth++;
    const undos = this.#undos.length;
    try {
      const result = work();
      if (isPromise(result)) throw new TypeError("Cannot commit a transaction: its work returned a promise");
      this.db.exec(commit);
      return result;
    } catch (error) {
      // Some errors (a full disk) end the whole transaction by themselves; a COMMIT refused by a constraint does not.
      if (this.db.isTransaction) this.db.exec(undo);
      for (const back of this.#undos.splice(undos).reverse()) back();
      throw error;
    } finally {
      if (--this.#depth === 0) this.#undos = [];
    }
  }

  onRollback(undo: () => void): void {
    if (this.#depth > 0) this.#undos.push(undo);
  }
}

function isPromise(value: unknown): boolean {
  return typeof (value as { then?: unknown } | null | undefined)?.then === "function";
}
