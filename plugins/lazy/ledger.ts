import type { Logger } from "@logtape/logtape";
import type { Journal, Note, Store } from "../../main.ts";
import type { Clock } from "../shared/clock.ts";
import { messageOf } from "../shared/errors.ts";
import { counted, type Counts, isKind } from "./counts.ts";
import { KINDS } from "./notes.ts";

const MIGRATIONS = [
  `CREATE TABLE lazy_counts (
     instance_id TEXT PRIMARY KEY REFERENCES instances (id) ON DELETE CASCADE,
     body TEXT NOT NULL
   ) STRICT, WITHOUT ROWID;
   CREATE TABLE lazy_snapshot (
     only INTEGER PRIMARY KEY CHECK (only = 1),
     seq INTEGER NOT NULL,
     pending INTEGER NOT NULL
   ) STRICT;
   INSERT INTO lazy_snapshot VALUES (1, 0, 0);`,
];

/** A snapshot is due after so many notes, and this long (milliseconds) after the first that is in none. */
const EVERY_NOTES = 100;
const EVERY_MS = 300_000;
const PAGE = 500;

export interface LedgerOptions {
  store: Store;
  /** Without one, every note is counted on disk at once. */
  journal: Journal | undefined;
  clock: Clock;
  log: Logger;
  /** Whether there still is an instance of that id. */
  exists(id: string): boolean;
}

/**
 * The counts of all instances: in memory, with a snapshot on disk that is complete up to the note `seq`, and the notes
 * after it in the journal. How many those are is kept beside it, so that reading them again ends at the last.
 */
export class Ledger {
  readonly #options: LedgerOptions;
  readonly #counts = new Map<string, Counts>();
  readonly #dirty = new Set<string>();
  readonly #statements;
  #taken = 0;
  /** The journal is off and has notes that are in no count: those of now must not pass for what comes after them. */
  #behind = false;
  #cancel: (() => void) | undefined;

  constructor(options: LedgerOptions) {
    this.#options = options;
    const { db } = options.store;
    options.store.migrate("lazy", MIGRATIONS);
    this.#statements = {
      write: db.prepare("INSERT OR REPLACE INTO lazy_counts VALUES (?, ?)"),
      // Where nothing waits, all before this note is in the snapshot: what lies between needs no second look.
      note: db.prepare(
        "UPDATE lazy_snapshot SET seq = CASE pending WHEN 0 THEN ? - 1 ELSE seq END, pending = pending + 1",
      ),
      done: db.prepare("UPDATE lazy_snapshot SET pending = 0"),
      where: db.prepare("SELECT seq, pending FROM lazy_snapshot"),
      all: db.prepare("SELECT instance_id, body FROM lazy_counts"),
    };
  }

  of(id: string): Counts | undefined {
    return this.#counts.get(id);
  }

  /** From the snapshot and what the journal has after it. Called again, it comes to the same. */
  rebuild(): void {
    const { journal, exists, log } = this.#options;
    for (const { instance_id, body } of this.#statements.all.iterate()) {
      const counts: Counts = JSON.parse(body as string);
      if (exists(instance_id as string)) this.#counts.set(instance_id as string, counts);
    }
    const { seq, pending } = this.#statements.where.get() as { seq: number; pending: number };
    this.#behind = journal === undefined && pending > 0;
    if (!journal) return;
    let [after, left] = [seq, pending];
    while (left > 0) {
      const rows = journal.read({ after, limit: Math.min(left, PAGE), types: Object.keys(KINDS) });
      if (rows.length === 0) break;
      for (const row of rows) {
        if (!exists(row.instance_id)) continue;
        this.#count(row.instance_id, row);
        this.#dirty.add(row.instance_id);
      }
      after = rows[rows.length - 1].seq;
      left -= rows.length;
    }
    if (left > 0) log.warn("The journal lacks {left} notes: the counts of lazy instances are low", { left });
    if (pending > 0) this.#write();
  }

  /** In the transaction of each note of ours. */
  commit(note: Note): void {
    if (!isKind(note.type)) return;
    if (this.#options.journal) this.#statements.note.run(note.seq);
    else this.#store(note.instance_id, this.#counted(note.instance_id, note));
  }

  /** After it. */
  take(note: Note): void {
    this.#count(note.instance_id, note);
    if (!this.#options.journal) return;
    this.#dirty.add(note.instance_id);
    if (++this.#taken >= EVERY_NOTES) this.#flush();
    else this.#cancel ??= this.#options.clock.after(EVERY_MS, this.#flush);
  }

  forget(id: string): void {
    this.#counts.delete(id);
    this.#dirty.delete(id);
  }

  /** For deletions that were missed. */
  prune(): void {
    for (const id of [...this.#counts.keys()]) if (!this.#options.exists(id)) this.forget(id);
  }

  /** Leaves a complete snapshot. */
  close(): void {
    if (this.#taken > 0) this.#flush();
  }

  #flush = (): void => {
    this.#cancel?.();
    this.#cancel = undefined;
    try {
      this.#write();
      this.#taken = 0;
    } catch (error) {
      // Nothing is lost: the journal has it, and the next note is the next occasion.
      this.#options.log.error("Writing the counts failed: {reason}", { reason: messageOf(error), error });
    }
  };

  #write(): void {
    this.#options.store.transaction(() => {
      for (const id of this.#dirty) if (this.#options.exists(id)) this.#store(id, this.#counts.get(id)!);
      this.#statements.done.run();
    });
    this.#dirty.clear();
  }

  #count(id: string, note: Parameters<typeof counted>[1]): void {
    this.#counts.set(id, this.#counted(id, note));
  }

  #counted(id: string, note: Parameters<typeof counted>[1]): Counts {
    const before = this.#counts.get(id);
    const after = counted(before, note);
    return this.#behind ? { ...after, seq: before?.seq ?? 0 } : after;
  }

  #store(id: string, counts: Counts): void {
    this.#statements.write.run(id, JSON.stringify(counts));
  }
}
