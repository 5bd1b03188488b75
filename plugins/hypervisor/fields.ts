import * as v from "valibot";
import type { Extension, FieldExtension, Instance, Store } from "../../main.ts";
import { DormouseError } from "../../main.ts";

const MIGRATIONS = [
  `CREATE TABLE runtimes (
     instance_id TEXT NOT NULL REFERENCES instances (id) ON DELETE CASCADE,
     field TEXT NOT NULL,
     body TEXT NOT NULL,
     PRIMARY KEY (instance_id, field)
   ) STRICT, WITHOUT ROWID;`,
];

/** Fields of the HTTP contract that belong to plugins which may be off, by the plugin to turn on. */
const OWNERS: Record<string, string> = {
  auto_standby: "conntrack-standby",
  wake: "wake",
  health_check: "health",
  restart_policy: "restart",
  lazy: "lazy",
  snapshot_policy: "qemu",
};

/** The per-instance policy fields that plugins own, and what the plugins remember about each instance. */
export class Fields {
  readonly #store: Store;
  readonly #fields = new Map<string, FieldExtension<unknown, unknown>>();
  readonly #runtimes = new Map<string, Map<string, unknown>>();

  constructor(store: Store) {
    this.#store = store;
    store.migrate("hypervisor-fields", MIGRATIONS);
    for (const row of store.db.prepare("SELECT instance_id, field, body FROM runtimes").iterate()) {
      this.#of(row.field as string).set(row.instance_id as string, JSON.parse(row.body as string));
    }
  }

  extend<P, R>(extension: FieldExtension<P, R>, exists: (id: string) => boolean): Extension<P, R> {
    const { field } = extension;
    if (this.#fields.has(field)) throw new TypeError(`Cannot extend instances by "${field}": the field is taken`);
    this.#fields.set(field, extension as unknown as FieldExtension<unknown, unknown>);
    const runtimes = this.#of(field) as Map<string, R>;
    return {
      policy: (instance) => instance.policies[field] as P | undefined,
      runtime: (id) => runtimes.get(id),
      save: (id, runtime) => {
        if (!exists(id)) return;
        this.#write(field, id, runtime);
        const before = runtimes.get(id);
        const remember = (value: R | undefined) => value === undefined ? runtimes.delete(id) : runtimes.set(id, value);
        remember(runtime);
        this.#store.onRollback(() => remember(before));
      },
      [Symbol.dispose]: () => void this.#fields.delete(field),
    };
  }

  /** Schemas of the fields for a body; `clearable` ones accept null. */
  entries({ clearable }: { clearable: boolean }): Record<string, v.GenericSchema> {
    const optional = (schema: v.GenericSchema) => v.optional(clearable ? v.nullable(schema) : schema);
    return Object.fromEntries([...this.#fields].map(([field, { schema }]) => [field, optional(schema)]));
  }

  /** Schemas of what the fields add to a response. */
  presented(): Record<string, v.GenericSchema> {
    const all = [...this.#fields.values()];
    return Object.assign(
      {},
      ...all.map(({ field, schema, presented }) => ({ [field]: v.optional(schema), ...presented })),
    );
  }

  /** The instance's policies with those of a body laid over them, each checked by its owner. */
  policies(body: Record<string, unknown>, instance: Instance): Record<string, unknown> {
    const policies: Record<string, unknown> = { ...instance.policies };
    for (const [field, { normalise = (policy: unknown) => policy }] of this.#fields) {
      if (body[field] === undefined) continue;
      const policy = body[field] === null ? undefined : normalise(body[field], instance);
      if (policy === undefined) delete policies[field];
      else policies[field] = policy;
    }
    return policies;
  }

  /** The policies that a fork of an instance begins with. */
  forked({ policies: source }: Instance): Record<string, unknown> {
    const policies: Record<string, unknown> = { ...source };
    for (const [field, { forked }] of this.#fields) {
      if (!forked || policies[field] === undefined) continue;
      policies[field] = forked(policies[field]);
      if (policies[field] === undefined) delete policies[field];
    }
    return policies;
  }

  /** What the fields add to an instance's response; undefined where no plugin adds anything. */
  present(instance: Instance): Record<string, unknown> | undefined {
    if (this.#fields.size === 0) return undefined;
    const parts = [...this.#fields.values()].map(({ field, present }) => {
      const policy = instance.policies[field];
      const runtime = this.#of(field).get(instance.id);
      return { ...(policy !== undefined && { [field]: policy }), ...present?.(instance, policy, runtime) };
    });
    return Object.assign({}, ...parts);
  }

  /** After the instance's row is gone, and with it the rows of its runtimes. */
  forget(id: string): void {
    for (const runtimes of this.#runtimes.values()) runtimes.delete(id);
  }

  /** Valibot takes an array for an object. @throws {DormouseError} with the field's code */
  refuseArrays(body: Record<string, unknown>): void {
    for (const [field, { code = "invalid_request" }] of this.#fields) {
      if (!Array.isArray(body[field])) continue;
      const message = `Wrong value of "${field}": expected an object, found an array`;
      throw new DormouseError(code, message, { details: { field } });
    }
  }

  codeOf(field: string) {
    return this.#fields.get(field)?.code;
  }

  /** @throws {DormouseError} `feature_off` where the body has a field whose plugin is off */
  refuseOff(body: Record<string, unknown>): void {
    for (const [field, plugin] of Object.entries(OWNERS)) {
      if (body[field] === undefined || this.#fields.has(field)) continue;
      const message = `Cannot use field "${field}": turn on its plugin with [plugins.${plugin}] in the config`;
      throw new DormouseError("feature_off", message, { details: { field, plugin } });
    }
  }

  #of(field: string): Map<string, unknown> {
    let runtimes = this.#runtimes.get(field);
    if (!runtimes) this.#runtimes.set(field, runtimes = new Map());
    return runtimes;
  }

  #write(field: string, id: string, runtime: unknown): void {
    const { db } = this.#store;
    this.#store.transaction(() => {
      if (runtime === undefined) db.prepare("DELETE FROM runtimes WHERE instance_id = ? AND field = ?").run(id, field);
      else db.prepare("INSERT OR REPLACE INTO runtimes VALUES (?, ?, ?)").run(id, field, JSON.stringify(runtime));
    });
  }
}
