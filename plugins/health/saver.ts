import type { Store } from "../../main.ts";
import type { Clock } from "../shared/clock.ts";

/** Milliseconds between two writes. */
const TICK = 1_000;
/** Ticks from a change that is no hurry to its write: one row an instance in so many, at most. */
const PATIENCE = 30;
/** Rows of one write, and so of one second, however many instances there are. */
const ROWS = 100;

/** Writes what may be lost when the host dies, a bounded number of rows a second in one transaction, the last value always. */
export class Saver {
  readonly #store: Store;
  readonly #clock: Clock;
  readonly #write: (id: string) => void;
  readonly #failed: (error: unknown) => void;
  /** By the tick in which they are due, the first one first. Ticks and not times: a clock may step. */
  readonly #dirty = new Map<string, number>();
  #tick = 0;
  #cancel: (() => void) | undefined;

  /** `write` is called in a transaction; `failed` is told what a write in the background ran into. */
  constructor(
    options: { store: Store; clock: Clock; write: (id: string) => void; failed: (error: unknown) => void },
  ) {
    this.#store = options.store;
    this.#clock = options.clock;
    this.#write = options.write;
    this.#failed = options.failed;
  }

  /** Constant time. */
  later(id: string): void {
    if (!this.#dirty.has(id)) this.#dirty.set(id, this.#tick + PATIENCE);
    this.#cancel ??= this.#clock.after(TICK, this.#flush);
  }

  /** It was written by other means, or is gone. */
  forget(id: string): void {
    this.#dirty.delete(id);
  }

  /** Writes all that waits. */
  close(): void {
    this.#cancel?.();
    this.#cancel = undefined;
    this.#writeAll([...this.#dirty.keys()]);
  }

  #flush = (): void => {
    this.#cancel = undefined;
    this.#tick++;
    const due: string[] = [];
    for (const [id, tick] of this.#dirty) {
      if (tick > this.#tick || due.length >= ROWS) break;
      due.push(id);
    }
    try {
      this.#writeAll(due);
    } catch (error) {
      this.#failed(error); // it all still waits, and is tried again
    }
    if (this.#dirty.size > 0) this.#cancel = this.#clock.after(TICK, this.#flush);
  };

  #writeAll(ids: string[]): void {
    if (ids.length === 0) return;
    this.#store.transaction(() => ids.forEach(this.#write));
    for (const id of ids) this.#dirty.delete(id);
  }
}
