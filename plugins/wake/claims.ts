import type { StatementSync } from "node:sqlite";
import { type CommitContext, DormouseError, type Instance, type LifecycleEvent, type Store } from "../../main.ts";
import { policyOf, type PublishedPort } from "./policy.ts";

const STEPS = [
  `CREATE TABLE wake_claims (
     kind TEXT NOT NULL CHECK (kind IN ('port', 'host')),
     value TEXT NOT NULL,
     instance_id TEXT NOT NULL REFERENCES instances (id) ON DELETE CASCADE,
     PRIMARY KEY (kind, value)
   ) STRICT, WITHOUT ROWID;
   CREATE INDEX wake_claims_instance ON wake_claims (instance_id);`,
];

type Claim = readonly ["port" | "host", string];

/** A published port and whose it is. */
export interface Published extends PublishedPort {
  readonly instance_id: string;
}

/**
 * Who has which host port and which HTTP host. The table decides: it is written in the transaction that writes the
 * policy, so of two that want the same, one is rolled back. Memory follows with the events, for the way of a connection.
 */
export class Claims {
  readonly #store: Store;
  readonly #find: (id: string) => Instance | undefined;
  readonly #ports = new Map<number, Published>();
  readonly #hosts = new Map<string, string>();
  /** The policy that memory holds the claims of, by instance. */
  readonly #known = new Map<string, unknown>();
  readonly #holder: StatementSync;
  readonly #insert: StatementSync;
  readonly #clear: StatementSync;

  constructor(store: Store, find: (id: string) => Instance | undefined) {
    this.#store = store;
    this.#find = find;
    store.migrate("wake", STEPS);
    this.#holder = store.db.prepare("SELECT instance_id FROM wake_claims WHERE kind = ? AND value = ?");
    this.#insert = store.db.prepare("INSERT INTO wake_claims VALUES (?, ?, ?)");
    this.#clear = store.db.prepare("DELETE FROM wake_claims WHERE instance_id = ?");
  }

  port(host_port: number): Published | undefined {
    return this.#ports.get(host_port);
  }

  /** The id of the instance that has the host. */
  host(name: string): string | undefined {
    return this.#hosts.get(name);
  }

  ports(): Iterable<Published> {
    return this.#ports.values();
  }

  /** @throws {DormouseError} `port_conflict`, `host_conflict` with the holder's name */
  check(instance: Instance): void {
    for (const [kind, value] of claimsOf(instance)) {
      const holder = this.#holder.get(kind, value)?.instance_id as string | undefined;
      if (holder === undefined || holder === instance.id) continue;
      const name = this.#find(holder)?.name ?? holder;
      const what = kind === "port" ? "host port" : "host";
      const message = `Cannot use ${what} "${value}": instance "${name}" has it`;
      throw new DormouseError(kind === "port" ? "port_conflict" : "host_conflict", message, {
        details: { holder: name, [kind]: value },
      });
    }
  }

  /** Part of the transaction of a change. @throws as {@linkcode Claims.check} */
  commit({ before, after }: CommitContext): void {
    if (!after || before?.policies.wake === after.policies.wake) return; // rows of one that goes, go with its own
    this.check(after);
    this.#write(after);
  }

  /** After the change. */
  follow({ to, instance }: LifecycleEvent): void {
    if (to === null) this.#forget(instance.id);
    else if (this.#known.get(instance.id) !== instance.policies.wake) this.#learn(instance);
  }

  /**
   * Makes table and memory anew from the instances, which may have been changed while the plugin was off. Returns what
   * two of them claim, which then only the older one has.
   */
  rebuild(instances: readonly Instance[]): DormouseError[] {
    const conflicts: DormouseError[] = [];
    this.#ports.clear();
    this.#hosts.clear();
    this.#known.clear();
    this.#store.transaction(() => {
      this.#store.db.exec("DELETE FROM wake_claims");
      for (const instance of instances) {
        try {
          this.check(instance);
        } catch (error) {
          if (!(error instanceof DormouseError)) throw error;
          conflicts.push(error);
          continue;
        }
        this.#write(instance);
        this.#learn(instance);
      }
    });
    return conflicts;
  }

  #write(instance: Instance): void {
    this.#clear.run(instance.id);
    for (const [kind, value] of claimsOf(instance)) this.#insert.run(kind, value, instance.id);
  }

  #learn(instance: Instance): void {
    this.#forget(instance.id);
    if (instance.policies.wake === undefined) return;
    const { ports, hosts } = policyOf(instance);
    for (const port of ports) this.#ports.set(port.host_port, { ...port, instance_id: instance.id });
    for (const host of hosts) this.#hosts.set(host, instance.id);
    this.#known.set(instance.id, instance.policies.wake);
  }

  #forget(id: string): void {
    const before = this.#known.get(id);
    if (before === undefined) return;
    const { ports, hosts } = policyOf({ policies: { wake: before } });
    for (const { host_port } of ports) {
      if (this.#ports.get(host_port)?.instance_id === id) this.#ports.delete(host_port);
    }
    for (const host of hosts) if (this.#hosts.get(host) === id) this.#hosts.delete(host);
    this.#known.delete(id);
  }
}

function claimsOf(instance: Instance): Claim[] {
  const { ports, hosts } = policyOf(instance);
  return [
    ...ports.map(({ host_port }) => ["port", String(host_port)] as const),
    ...hosts.map((host) => ["host", host] as const),
  ];
}
