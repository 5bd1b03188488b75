import type { StatementSync } from "node:sqlite";
import { DormouseError, type Store } from "../../main.ts";
import type { Subnet } from "./subnet.ts";

/**
 * `addresses` is the truth about what is in use: a row comes and goes in the transaction that makes and deletes its
 * instance. Addresses are given out in turn, then those that were released longest ago, so that one which is still in
 * somebody's cache or conntrack table rests as long as can be. Every query is answered from an index.
 */
const STEPS = [
  `
    CREATE TABLE addresses (
      instance_id TEXT NOT NULL PRIMARY KEY,
      offset INTEGER NOT NULL UNIQUE
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE addresses_released (
      turn INTEGER PRIMARY KEY AUTOINCREMENT,
      offset INTEGER NOT NULL UNIQUE
    ) STRICT;
    CREATE TABLE network (
      id INTEGER PRIMARY KEY CHECK (id = 1),
      subnet TEXT NOT NULL,
      next_offset INTEGER NOT NULL
    ) STRICT;
  `,
];

/** The persisted allocator of a subnet's addresses. */
export class Addresses {
  readonly #store: Store;
  readonly #subnet: Subnet;
  readonly #of: StatementSync;
  readonly #insert: StatementSync;
  readonly #delete: StatementSync;
  readonly #next: StatementSync;
  readonly #oldest: StatementSync;
  readonly #release: StatementSync;

  /** @throws {DormouseError} `config_invalid` where instances have addresses of another subnet */
  constructor(store: Store, subnet: Subnet) {
    store.migrate("network", STEPS);
    this.#store = store;
    this.#subnet = subnet;
    this.#claim();
    const { db } = store;
    this.#of = db.prepare("SELECT offset FROM addresses WHERE instance_id = ?");
    this.#insert = db.prepare("INSERT INTO addresses (instance_id, offset) VALUES (?, ?)");
    this.#delete = db.prepare("DELETE FROM addresses WHERE instance_id = ? RETURNING offset");
    this.#next = db.prepare(
      "UPDATE network SET next_offset = next_offset + 1 WHERE next_offset <= ? RETURNING next_offset - 1 AS offset",
    );
    this.#oldest = db.prepare(
      "DELETE FROM addresses_released WHERE turn = (SELECT MIN(turn) FROM addresses_released) RETURNING offset",
    );
    this.#release = db.prepare("INSERT INTO addresses_released (offset) VALUES (?)");
  }

  /**
   * The instance's address, reserved in the caller's transaction; the same one when asked again.
   *
   * @throws {DormouseError} `insufficient_resources` where all are in use
   */
  allocate(id: string): string {
    return this.#store.transaction(() => {
      const own = offsetOf(this.#of.get(id));
      if (own !== undefined) return this.#subnet.ip(own);
      const free = offsetOf(this.#next.get(this.#subnet.last)) ?? offsetOf(this.#oldest.get());
      if (free === undefined) {
        const message = `Cannot allocate an address of ${this.#subnet.cidr}: all ${
          this.#subnet.last - this.#subnet.first + 1
        } are in use`;
        throw new DormouseError("insufficient_resources", message);
      }
      this.#insert.run(id, free);
      return this.#subnet.ip(free);
    });
  }

  /** Frees the instance's address, in the caller's transaction; one that has none is no error. */
  release(id: string): void {
    this.#store.transaction(() => {
      const offset = offsetOf(this.#delete.get(id));
      if (offset !== undefined) this.#release.run(offset);
    });
  }

  /** Every address in use, by instance. */
  all(): Map<string, string> {
    const rows = this.#store.db.prepare("SELECT instance_id, offset FROM addresses").all();
    return new Map(rows.map(({ instance_id, offset }) => [instance_id as string, this.#subnet.ip(offset as number)]));
  }

  // Offsets mean nothing in another subnet, and the instances' own rows and namespaces hold the old addresses.
  #claim(): void {
    const { cidr, first } = this.#subnet;
    this.#store.transaction(() => {
      const { db } = this.#store;
      const before = db.prepare("SELECT subnet FROM network").get()?.subnet;
      if (before === cidr) return;
      const { used } = db.prepare("SELECT COUNT(*) AS used FROM addresses").get() as { used: number };
      if (used > 0) {
        const message = `Cannot use subnet "${cidr}": ${used} instances have addresses of "${before}"`;
        throw new DormouseError("config_invalid", message);
      }
      db.exec("DELETE FROM addresses_released");
      db.prepare("INSERT OR REPLACE INTO network VALUES (1, ?, ?)").run(cidr, first);
    });
  }
}

function offsetOf(row: Record<string, unknown> | undefined): number | undefined {
  return row?.offset as number | undefined;
}
