import type { Store } from "../../main.ts";
import type { Clock } from "../shared/clock.ts";

/** How often one instance is written at most, in milliseconds; holds are written at once. */
const EVERY = 5_000;
/** Instances that are due together are written in one transaction. */
const GATHER = 250;

interface Row {
  written: number;
  /** As it is on disk: what has not changed is not written again. */
  text: string;
}

/** Writes what is remembered of instances: bounded in rate, the last value always. */
export class Saver<R> {
  readonly #store: Store;
  readonly #clock: Clock;
  readonly #save: (id: string, value: R) => void;
  readonly #failed: (error: unknown) => void;
  readonly #dirty = new Map<string, () => R>();
  readonly #rows = new Map<string, Row>();
  #cancel: (() => void) | undefined;

  /** `failed` is told what a write in the background ran into. */
  constructor(
    options: { store: Store; clock: Clock; save: (id: string, value: R) => void; failed: (error: unknown) => void },
  ) {
    this.#store = options.store;
    this.#clock = options.clock;
    this.#save = options.save;
    this.#failed = options.failed;
  }

  /** Writes what `value` returns by then, soon. Constant time. */
  later(id: string, value: () => R): void {
    this.#dirty.set(id, value);
    this.#cancel ??= this.#clock.after(GATHER, this.#flush);
  }

  /** Writes it now; durable when this returns. */
  now(id: string, value: R): void {
    this.#save(id, value);
    this.#written(id, value);
    this.#dirty.delete(id);
  }

  forget(id: string): void {
    this.#dirty.delete(id);
    this.#rows.delete(id);
  }

  /** Writes all that waits. */
  close(): void {
    this.#cancel?.();
    this.#cancel = undefined;
    this.#writeAll(() => true);
  }

  #flush = (): void => {
    this.#cancel = undefined;
    const now = this.#clock.now();
    try {
      this.#writeAll((id) => {
        const written = this.#rows.get(id)?.written ?? -Infinity;
        return written + EVERY <= now || written > now; // the clock stepped back
      });
    } catch (error) {
      this.#failed(error); // it all still waits, and is tried again
    }
    if (this.#dirty.size > 0) this.#cancel ??= this.#clock.after(GATHER, this.#flush);
  };

  #writeAll(due: (id: string) => boolean): void {
    const ids = [...this.#dirty.keys()].filter(due);
    if (ids.length === 0) return;
    const values = ids.map((id) => [id, this.#dirty.get(id)!()] as const);
    const changed = values.filter(([id, value]) => this.#rows.get(id)?.text !== JSON.stringify(value));
    if (changed.length > 0) this.#store.transaction(() => changed.forEach(([id, value]) => this.#save(id, value)));
    for (const [id, value] of changed) this.#written(id, value);
    for (const id of ids) this.#dirty.delete(id);
  }

  #written(id: string, value: R): void {
    this.#rows.set(id, { written: this.#clock.now(), text: JSON.stringify(value) });
  }
}
