import type { DatabaseSync, StatementSync } from "node:sqlite";
import type { EventStream, JournalQuery, JournalRow, LifecycleEvent, State } from "../../main.ts";
import { messageOfChange, messageOfNote } from "../shared/stream-events.ts";

const COLUMNS = "id, instance, name, type, event, ts, from_state, to_state, actor, cause, summary, detail";
const TYPES = "SELECT value FROM json_each(?)";
/** What one look at the table takes at most: rows, and bytes unless the first row alone has more. */
const WINDOW = 256;
const WINDOW_BYTES = 1024 * 1024;

/** A row as clients get it. */
export interface Frame {
  readonly seq: number;
  readonly instance_id: string;
  readonly type: string;
  readonly event: string;
  readonly message: Parameters<EventStream["send"]>[0];
}
/** Rows in order, and up to which number these are all there are. */
export interface Frames {
  readonly frames: readonly Frame[];
  readonly to: number;
}

/** Looks into the table. What streams send and pages show comes from here, so it is the same at any time. */
export class Reader {
  readonly #db: DatabaseSync;
  readonly #last: () => number;
  readonly #window: StatementSync;
  readonly #windowOf: StatementSync;
  readonly #knows: StatementSync;
  readonly #oldest: StatementSync;
  readonly #queries = new Map<string, StatementSync>();

  /** `last` is the number of the last row. */
  constructor(db: DatabaseSync, last: () => number) {
    this.#db = db;
    this.#last = last;
    const [shown, order] = [`SELECT ${COLUMNS}, shown, bytes FROM journal`, `ORDER BY id LIMIT ${WINDOW}`];
    this.#window = db.prepare(`${shown} WHERE id > ? ${order}`);
    this.#windowOf = db.prepare(`${shown} INDEXED BY journal_instance WHERE instance = ? AND id > ? ${order}`);
    this.#knows = db.prepare("SELECT 1 FROM journal INDEXED BY journal_instance WHERE instance = ? LIMIT 1");
    this.#oldest = db.prepare("SELECT min(id) AS id FROM journal");
  }

  /** The number of the oldest row, of the next one where there is none. */
  get oldest(): number {
    return this.#oldest.get()!.id as number | null ?? this.#last() + 1;
  }

  /** Whether there are rows of the instance. */
  knows(instance: string): boolean {
    return this.#knows.get(instance) !== undefined;
  }

  /** The rows above a number, of all instances or one: as many as are read at once. */
  window(after: number, instance?: string): Frames {
    const frames: Frame[] = [];
    let bytes = 0;
    const rows = instance === undefined ? this.#window.iterate(after) : this.#windowOf.iterate(instance, after);
    for (const raw of rows) {
      const frame = frameOf(rowOf(raw), raw.shown as string | null);
      frames.push(frame);
      bytes += raw.bytes as number;
      if (bytes > WINDOW_BYTES || frames.length === WINDOW) return { frames, to: frame.seq };
    }
    return { frames, to: Math.max(after, this.#last()) };
  }

  read({ after, limit, instance, types }: JournalQuery): JournalRow[] {
    const conditions = ["id > ?"];
    const values: (string | number)[] = [after];
    if (instance !== undefined) {
      conditions.push("instance = ?");
      values.push(instance);
    }
    if (types) {
      const list = JSON.stringify(types);
      conditions.push(`(type IN (${TYPES}) OR event IN (${TYPES}))`);
      values.push(list, list);
    }
    const index = instance === undefined ? "" : "INDEXED BY journal_instance";
    const sql = `SELECT ${COLUMNS} FROM journal ${index} WHERE ${conditions.join(" AND ")} ORDER BY id LIMIT ?`;
    let query = this.#queries.get(sql);
    if (!query) this.#queries.set(sql, query = this.#db.prepare(sql));
    return query.all(...values, limit).map(rowOf);
  }
}

function rowOf(raw: Record<string, unknown>): JournalRow {
  return {
    seq: raw.id as number,
    instance_id: raw.instance as string,
    instance_name: raw.name as string,
    type: raw.type as string,
    event: raw.event as string,
    at: raw.ts as number,
    from: raw.from_state as State | null,
    to: raw.to_state as State | null,
    actor: raw.actor as string,
    cause: raw.cause as string,
    summary: raw.summary as string | null,
    detail: JSON.parse(raw.detail as string),
  };
}

function frameOf(row: JournalRow, shown: string | null): Frame {
  const { seq, instance_id, type, event, summary } = row;
  const message = summary === null
    ? messageOfChange({ ...row, action: type as LifecycleEvent["action"] }, shown ?? "null")
    : messageOfNote({ ...row, summary });
  return { seq, instance_id, type, event, message };
}
