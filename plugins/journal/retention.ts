import type { Logger } from "@logtape/logtape";
import type { Clock } from "../shared/clock.ts";
import { messageOf } from "../shared/errors.ts";
import type { Limits, Rows } from "./rows.ts";

/** Milliseconds between two looks, and between two batches where the first was not all. */
const EVERY = 10_000;
const PAUSE = 25;

/** Removes rows that are over the limits, one batch at a time, until it is disposed of. */
export class Retention implements Disposable {
  readonly #rows: Rows;
  readonly #limits: Limits;
  readonly #clock: Clock;
  readonly #log: Logger;
  #cancel: () => void;

  constructor(rows: Rows, limits: Limits, { clock, log }: { clock: Clock; log: Logger }) {
    this.#rows = rows;
    this.#limits = limits;
    this.#clock = clock;
    this.#log = log;
    this.#cancel = clock.after(PAUSE, this.#prune);
  }

  [Symbol.dispose](): void {
    this.#cancel();
  }

  #prune = (): void => {
    let wait = EVERY;
    try {
      if (this.#rows.prune(this.#limits, this.#clock.now()) > 0) wait = PAUSE;
    } catch (error) {
      // Such as a full disk: the rows stay, and the next look tries again.
      this.#log.error("Pruning the journal failed: {reason}", { reason: messageOf(error), error });
    }
    this.#cancel = this.#clock.after(wait, this.#prune);
  };
}
