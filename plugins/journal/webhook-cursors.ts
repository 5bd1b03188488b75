import type { Logger } from "@logtape/logtape";
import type { Store } from "../../main.ts";
import type { Clock } from "../shared/clock.ts";
import { messageOf } from "../shared/errors.ts";

/** Milliseconds. What was sent since the last write is sent again after a crash; what was not is never passed over. */
const WRITE_EVERY = 500;

const MIGRATIONS = [
  `CREATE TABLE journal_webhooks (webhook TEXT PRIMARY KEY, next INTEGER NOT NULL) STRICT, WITHOUT ROWID;
   CREATE TABLE journal_webhook_lanes (
     webhook TEXT NOT NULL REFERENCES journal_webhooks ON DELETE CASCADE,
     instance TEXT NOT NULL,
     head INTEGER NOT NULL,
     until INTEGER NOT NULL,
     pending INTEGER NOT NULL,
     at INTEGER NOT NULL,
     PRIMARY KEY (webhook, instance)
   ) STRICT, WITHOUT ROWID;`,
];

/** The events of one instance that a webhook has not taken yet: `head` is the first of them, `until` the last. */
export interface LaneCursor {
  readonly instance: string;
  readonly head: number;
  readonly until: number;
  /** How many they are. */
  readonly pending: number;
  /** When the first of them happened, in milliseconds since the epoch. */
  readonly at: number;
}
/** All events before `next` are with the receiver, or are no business of its, or wait in the lane of their instance. */
export interface Cursor {
  readonly next: number;
  readonly lanes: Iterable<LaneCursor>;
}

/** Where the webhooks are, on disk: each as a whole and in one transaction, so what is read back was so at one moment. */
export class Cursors {
  readonly #store: Store;
  readonly #clock: Clock;
  readonly #log: Logger;
  readonly #dirty = new Map<string, () => Cursor>();
  readonly #statements;
  #cancel: (() => void) | undefined;

  constructor(store: Store, clock: Clock, log: Logger) {
    this.#store = store;
    this.#clock = clock;
    this.#log = log;
    store.migrate("journal-webhooks", MIGRATIONS);
    const { db } = store;
    this.#statements = {
      known: db.prepare("SELECT webhook FROM journal_webhooks"),
      drop: db.prepare("DELETE FROM journal_webhooks WHERE webhook = ?"),
      next: db.prepare("SELECT next FROM journal_webhooks WHERE webhook = ?"),
      lanes: db.prepare(
        "SELECT instance, head, until, pending, at FROM journal_webhook_lanes WHERE webhook = ? ORDER BY head",
      ),
      write: db.prepare(
        "INSERT INTO journal_webhooks VALUES (?, ?) ON CONFLICT (webhook) DO UPDATE SET next = excluded.next",
      ),
      clear: db.prepare("DELETE FROM journal_webhook_lanes WHERE webhook = ?"),
      add: db.prepare("INSERT INTO journal_webhook_lanes VALUES (?, ?, ?, ?, ?, ?)"),
    };
  }

  /** Forgets all webhooks but these. */
  keep(webhooks: readonly string[]): void {
    const gone = this.#statements.known.all().filter(({ webhook }) => !webhooks.includes(webhook as string));
    if (gone.length === 0) return;
    this.#store.transaction(() => gone.forEach(({ webhook }) => this.#statements.drop.run(webhook)));
  }

  /** Undefined for a webhook that is new. */
  load(webhook: string): { next: number; lanes: LaneCursor[] } | undefined {
    const row = this.#statements.next.get(webhook);
    if (!row) return undefined;
    return { next: row.next as number, lanes: this.#statements.lanes.all(webhook) as unknown as LaneCursor[] };
  }

  /** Writes it at once. */
  now(webhook: string, cursor: Cursor): void {
    this.#store.transaction(() => this.#write(webhook, cursor));
  }

  /** Writes what `cursor` returns by then, soon. Constant time. */
  later(webhook: string, cursor: () => Cursor): void {
    this.#dirty.set(webhook, cursor);
    this.#cancel ??= this.#clock.after(WRITE_EVERY, this.#flush);
  }

  /** Writes all that waits. */
  close(): void {
    this.#cancel?.();
    this.#cancel = undefined;
    this.#writeAll();
  }

  #flush = (): void => {
    this.#cancel = undefined;
    try {
      this.#writeAll();
    } catch (error) {
      this.#log.error("Cannot write where the webhooks are: {reason}", { reason: messageOf(error), error });
      this.#cancel = this.#clock.after(WRITE_EVERY, this.#flush); // it all still waits
    }
  };

  #writeAll(): void {
    if (this.#dirty.size === 0) return;
    this.#store.transaction(() => this.#dirty.forEach((cursor, webhook) => this.#write(webhook, cursor())));
    this.#dirty.clear();
  }

  #write(webhook: string, { next, lanes }: Cursor): void {
    const { write, clear, add } = this.#statements;
    write.run(webhook, next);
    clear.run(webhook);
    for (const { instance, head, until, pending, at } of lanes) add.run(webhook, instance, head, until, pending, at);
  }
}
