import type { Logger } from "@logtape/logtape";
import type { CommitContext, Instance, JournalRow, Note, Store } from "../../main.ts";
import { messageOf } from "../shared/errors.ts";

// `journal_instance` is in effect (instance, id): every index of SQLite ends in the row's id. `shown` is the instance's
// JSON at a change, as it was made for all who follow; `bytes` is there to be added up for `max_size`.
const STEPS = [
  `CREATE TABLE journal (
     id INTEGER PRIMARY KEY,
     instance TEXT NOT NULL,
     name TEXT NOT NULL,
     type TEXT NOT NULL,
     event TEXT NOT NULL,
     ts INTEGER NOT NULL,
     from_state TEXT,
     to_state TEXT,
     actor TEXT NOT NULL,
     cause TEXT NOT NULL,
     summary TEXT,
     bytes INTEGER NOT NULL,
     detail TEXT NOT NULL,
     shown TEXT
   ) STRICT;
   CREATE INDEX journal_instance ON journal (instance);
   CREATE INDEX journal_instance_ts ON journal (instance, ts);
   CREATE INDEX journal_ts ON journal (ts, bytes);
   CREATE TABLE journal_state (only INTEGER PRIMARY KEY CHECK (only = 1), first INTEGER NOT NULL) STRICT;
   INSERT INTO journal_state VALUES (1, 1);`,
];
/** Rows that are removed in one transaction, so that nobody waits long for it. */
const PRUNED_AT_ONCE = 100;
/** Bytes of a row beside its two texts, with its places in the indexes; about. */
const OVERHEAD = 300;

/** What is kept: what is over any of them goes, the oldest first. */
export interface Limits {
  /** Milliseconds. */
  max_age: number;
  max_rows: number;
  /** Bytes. */
  max_size: number;
}

export interface RowsParts {
  store: Store;
  log: Logger;
  /** The JSON of an instance as clients see it. */
  present(instance: Instance): string;
}

/** The table, as it grows and shrinks: one row for each change and each note, written in their transaction. */
export class Rows {
  readonly #parts: RowsParts;
  readonly #statements;
  readonly #listeners = new Set<() => void>();
  #first: number;
  #last: number;
  #count: number;
  #bytes: number;
  #pruned = 0;
  #telling = false;

  constructor(parts: RowsParts) {
    this.#parts = parts;
    const { db } = parts.store;
    parts.store.migrate("journal", STEPS);
    this.#statements = {
      insert: db.prepare("INSERT INTO journal VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"),
      eldest: db.prepare(`SELECT id, ts, bytes FROM journal ORDER BY id LIMIT ${PRUNED_AT_ONCE}`),
      prune: db.prepare("DELETE FROM journal WHERE id <= ?"),
      first: db.prepare("UPDATE journal_state SET first = ?"),
    };
    this.#first = db.prepare("SELECT first FROM journal_state").get()!.first as number;
    const { id } = db.prepare("SELECT max(id) AS id FROM journal").get()!;
    this.#last = Math.max(id as number | null ?? 0, this.#first - 1);
    // From an index that has all it needs, which is a fraction of the table.
    const sums = db.prepare("SELECT count(*) AS count, total(bytes) AS bytes FROM journal INDEXED BY journal_ts")
      .get()!;
    [this.#count, this.#bytes] = [sums.count as number, sums.bytes as number];
    this.#skip(db.prepare("SELECT value FROM sequence").get()!.value as number);
  }

  /** The lowest number from which on none is missing. */
  get first(): number {
    return this.#first;
  }

  /** The number of the last row, also where that is not kept any more. */
  get last(): number {
    return this.#last;
  }

  get count(): number {
    return this.#count;
  }

  /** Rows removed since the host started. */
  get pruned(): number {
    return this.#pruned;
  }

  /** Part of the transaction of a change. */
  change({ event, after }: CommitContext): void {
    const { action, instance } = event;
    const row = { ...event, instance_name: instance.name, type: action, event: action, summary: null };
    this.#write(row, after && this.#shown(after));
  }

  /** Part of the transaction of a note. */
  note(note: Note): void {
    this.#write({ ...note, instance_name: note.instance.name, from: null, to: null }, null);
  }

  /** Calls after each commit of one or more rows. */
  follow(listener: () => void): Disposable {
    // Not the function itself, which may be handed in twice.
    const own = () => listener();
    this.#listeners.add(own);
    return { [Symbol.dispose]: () => void this.#listeners.delete(own) };
  }

  /** Removes the oldest rows that are over a limit, one batch of them; returns how many. */
  prune({ max_age, max_rows, max_size }: Limits, now: number): number {
    let [rows, bytes, removed, freed, upTo] = [0, 0, 0, 0, 0];
    for (const row of this.#statements.eldest.iterate()) {
      const [count, size, ts] = [this.#count - rows, this.#bytes - bytes, row.ts as number];
      rows++;
      bytes += row.bytes as number;
      if (count > max_rows || (size > max_size && count > 1) || ts < now - max_age) {
        [removed, freed, upTo] = [rows, bytes, row.id as number];
        // One from the future says nothing of its age: the clock has stepped back since.
      } else if (ts <= now) break;
    }
    if (removed === 0) return 0;
    const first = Math.max(this.#first, upTo + 1);
    // Together: a host that dies in between would promise rows that are gone.
    this.#parts.store.transaction(() => {
      this.#statements.prune.run(upTo);
      this.#statements.first.run(first);
    });
    this.#first = first;
    this.#count -= removed;
    this.#bytes -= freed;
    this.#pruned += removed;
    return removed;
  }

  /** What happened while the journal was off has numbers and no rows. */
  #skip(sequence: number): void {
    if (sequence <= this.#last) return;
    const from = this.#last + 1;
    this.#parts.log.info("The journal begins at {first}: it was off from {from} on", { first: sequence + 1, from });
    this.#statements.first.run(sequence + 1);
    [this.#first, this.#last] = [sequence + 1, sequence];
  }

  #shown(instance: Instance): string {
    try {
      return this.#parts.present(instance);
    } catch (error) {
      // A plugin that cannot show its fields is no reason to undo the change.
      const { id, name, state } = instance;
      this.#parts.log.error("Showing instance {id} failed: {reason}", { id, reason: messageOf(error), error });
      return JSON.stringify({ id, name, state });
    }
  }

  #write(row: JournalRow, shown: string | null): void {
    const { seq, instance_id, instance_name, type, event, at, from, to, actor, cause, summary } = row;
    const detail = JSON.stringify(row.detail);
    const bytes = OVERHEAD + detail.length + (shown?.length ?? 0);
    const head = [seq, instance_id, instance_name, type, event, at, from, to, actor, cause, summary] as const;
    this.#statements.insert.run(...head, bytes, detail, shown);
    const last = this.#last;
    this.#last = seq;
    this.#count++;
    this.#bytes += bytes;
    this.#parts.store.onRollback(() => {
      this.#last = last;
      this.#count--;
      this.#bytes -= bytes;
    });
    this.#tell();
  }

  #tell(): void {
    if (this.#telling) return;
    this.#telling = true;
    // A transaction is synchronous, so by the next microtask it is on disk or undone.
    queueMicrotask(() => {
      this.#telling = false;
      for (const listener of [...this.#listeners]) {
        try {
          listener();
        } catch (error) {
          this.#parts.log.error("Telling of new rows failed: {reason}", { reason: messageOf(error), error });
        }
      }
    });
  }
}
