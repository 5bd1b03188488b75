import type {
  Action,
  Instance,
  LifecycleEvent,
  Note,
  NoteDraft,
  Origin,
  PluginHooks,
  State,
  Store,
} from "../../main.ts";
import { DormouseError } from "../../main.ts";
import { messageOf } from "../shared/errors.ts";

const MIGRATIONS = [
  `CREATE TABLE instances (id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, body TEXT NOT NULL) STRICT;
   CREATE TABLE sequence (only INTEGER PRIMARY KEY CHECK (only = 1), value INTEGER NOT NULL) STRICT;
   INSERT INTO sequence VALUES (1, 0);`,
];

/** An instance that nothing was asked of and that nothing happened to. */
export const BLANK: Instance = {
  id: "",
  name: "",
  driver: "",
  image: "",
  entrypoint: [],
  cmd: [],
  env: {},
  working_dir: null,
  run_as: null,
  tags: {},
  vcpus: null,
  memory_bytes: null,
  hints: {},
  network: { enabled: false, ip: null, mac: null, ip6: null },
  state: "Created",
  state_error: null,
  transition: null,
  created_at: 0,
  started_at: null,
  stopped_at: null,
  expires_at: null,
  exit_code: null,
  exit_message: null,
  phases: { since: 0, totals: {} },
  policies: {},
  revision: 0,
};

/** What a change is about: the action it concludes, or `state` for steps on the way and what happened by itself. */
export interface Change {
  action: Action;
  origin: Origin;
  detail?: Record<string, unknown>;
}

/** The rows of all instances, on disk and in memory alike. The only place where an instance changes. */
export class Records {
  readonly #store: Store;
  readonly #hooks: PluginHooks;
  readonly #byId = new Map<string, Instance>();
  readonly #byName = new Map<string, string>();
  readonly #now: () => number;
  readonly #statements;
  #seq: number;
  #writing = false;

  constructor(store: Store, hooks: PluginHooks, now: () => number = Date.now) {
    this.#store = store;
    this.#hooks = hooks;
    this.#now = now;
    store.migrate("hypervisor", MIGRATIONS);
    this.#statements = {
      sequence: store.db.prepare("UPDATE sequence SET value = ?"),
      insert: store.db.prepare("INSERT INTO instances VALUES (?, ?, ?)"),
      update: store.db.prepare("UPDATE instances SET body = ? WHERE id = ?"),
      remove: store.db.prepare("DELETE FROM instances WHERE id = ?"),
    };
    this.#seq = store.db.prepare("SELECT value FROM sequence").get()!.value as number;
    for (const { id, body } of store.db.prepare("SELECT id, body FROM instances ORDER BY rowid").iterate()) {
      this.#remember(parsed(id as string, body as string));
    }
  }

  /** By id. */
  find(id: string): Instance | undefined {
    return this.#byId.get(id);
  }

  named(name: string): Instance | undefined {
    const id = this.#byName.get(name);
    return id === undefined ? undefined : this.#byId.get(id);
  }

  /** By id, name or unique id prefix. @throws {DormouseError} `not_found`, `ambiguous` */
  resolve(reference: string): Instance {
    const exact = this.#byId.get(reference) ?? this.named(reference);
    if (exact) return exact;
    const matches = reference === "" ? [] : this.all().filter(({ id }) => id.startsWith(reference));
    if (matches.length === 1) return matches[0];
    if (matches.length === 0) throw notFound(reference);
    throw new DormouseError(
      "ambiguous",
      `Cannot resolve "${reference}": ${matches.length} ids begin with it, use the full id`,
    );
  }

  /** In the order of their creation. */
  all(): Instance[] {
    return [...this.#byId.values()];
  }

  get size(): number {
    return this.#byId.size;
  }

  /** A new row; `prepare` adds to it what it reserves in the same transaction. */
  insert(draft: Instance, change: Change, prepare?: () => Partial<Instance>): Instance {
    if (this.#byName.has(draft.name)) throw nameConflict(draft.name);
    return this.#commit((seq) => this.#write(seq, null, { ...draft, ...prepare?.(), revision: 1 }, change)).instance;
  }

  /** The next revision of a row. The time spent in the state so far is booked to it when the state changes. */
  update(id: string, fields: Partial<Instance>, change: Change): Instance {
    const before = this.#current(id);
    const state = fields.state ?? before.state;
    const phases = state === before.state ? before.phases : book(before, this.#now());
    const after = { ...before, ...fields, state, phases, revision: before.revision + 1 };
    return this.#commit((seq) => this.#write(seq, before, after, change)).instance;
  }

  /** The row goes, and in the same transaction what `within` and the commit hooks remove. */
  remove(id: string, change: Change, within: () => void): void {
    const before = this.#current(id);
    this.#commit((seq) => {
      within();
      return this.#write(seq, before, null, change);
    });
  }

  /**
   * A note beside the changes, with what `within` writes in the same transaction; `event` is its name on streams.
   *
   * @throws {TypeError} in the middle of a change, which has the next number already
   */
  note(instance: Instance, { type, origin, summary, detail }: NoteDraft, event: string, within?: () => void): Note {
    const note = this.#numbered((seq) => {
      within?.();
      const { actor, cause } = origin;
      const { id: instance_id } = instance;
      const about = {
        type,
        event,
        instance_id,
        instance,
        actor,
        cause,
        summary,
        detail: { ...origin.detail, ...detail },
      };
      const note: Note = { seq, at: this.#now(), ...about };
      this.#hooks.apply("note:commit", note);
      return note;
    });
    this.#hooks.publish("note:event", note);
    return note;
  }

  #current(id: string): Instance {
    const current = this.#byId.get(id);
    if (!current) throw notFound(id);
    return current;
  }

  /** Runs `write` in a transaction; only once that is on disk does memory follow and the event go out. */
  #commit(write: (seq: number) => LifecycleEvent): LifecycleEvent {
    const event = this.#numbered(write);
    if (event.to === null) this.#forget(event.instance);
    else this.#remember(event.instance);
    this.#hooks.publish("instance:event", event);
    return event;
  }

  /** Runs `write` in a transaction, with the next number of the sequence, which counts only if it succeeds. */
  #numbered<T>(write: (seq: number) => T): T {
    if (this.#writing) throw new TypeError("Cannot change or note anything from within a change");
    const seq = this.#seq + 1;
    this.#writing = true;
    try {
      const result = this.#store.transaction(() => {
        this.#statements.sequence.run(seq);
        return write(seq);
      });
      this.#seq = seq;
      return result;
    } finally {
      this.#writing = false;
    }
  }

  #write(seq: number, before: Instance | null, after: Instance | null, change: Change): LifecycleEvent {
    const { action, origin, detail } = change;
    const instance = (after ?? before)!;
    const event: LifecycleEvent = {
      seq,
      at: this.#now(),
      action,
      instance_id: instance.id,
      instance,
      from: before?.state ?? null,
      to: after?.state ?? null,
      actor: origin.actor,
      cause: origin.cause,
      detail: { ...origin.detail, ...detail },
    };
    const { insert, update, remove } = this.#statements;
    if (!after) remove.run(instance.id);
    else if (!before) insert.run(after.id, after.name, JSON.stringify(after));
    else update.run(JSON.stringify(after), after.id);
    this.#hooks.apply("instance:commit", { event, before, after });
    return event;
  }

  #remember(instance: Instance): void {
    this.#byId.set(instance.id, instance);
    this.#byName.set(instance.name, instance.id);
  }

  #forget({ id, name }: Instance): void {
    this.#byId.delete(id);
    this.#byName.delete(name);
  }
}

/** A row as it was written, perhaps by an older version that knew fewer fields. */
function parsed(id: string, body: string): Instance {
  let row: Partial<Instance>;
  try {
    row = JSON.parse(body);
  } catch (error) {
    // Without it nobody knows what to run or to remove, so going on would lose track of what may be running.
    throw new Error(`Cannot read the row of instance "${id}": ${messageOf(error)}`, { cause: error });
  }
  const phases = row.phases ?? { since: row.created_at ?? 0, totals: {} };
  return { ...BLANK, ...row, phases, network: { ...BLANK.network, ...row.network } };
}

/** Milliseconds in each state up to `at`, the current one included; a clock that went back adds nothing. */
export function phaseTotals({ phases, state }: Instance, at: number): Partial<Record<State, number>> {
  return { ...phases.totals, [state]: (phases.totals[state] ?? 0) + Math.max(0, at - phases.since) };
}

function book(before: Instance, at: number): Instance["phases"] {
  return { since: at, totals: phaseTotals(before, at) };
}

export function notFound(reference: string): DormouseError {
  return new DormouseError("not_found", `No instance "${reference}"`);
}

export function nameConflict(name: string): DormouseError {
  return new DormouseError("name_conflict", `Cannot use name "${name}": another instance has it`);
}
