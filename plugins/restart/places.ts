import type { Clock } from "../shared/clock.ts";

/**
 * Places for work that is begun side by side, so that hundreds of instances which fell together do not start at once.
 * Work keeps its place for a while at most and then goes on without, so what is slow or hangs holds up nobody for long.
 */
export class Places {
  readonly #clock: Clock;
  readonly #patience: number;
  readonly #waiting: (() => void)[] = [];
  #free: number;

  /** `patience` in milliseconds. */
  constructor(clock: Clock, { count, patience }: { count: number; patience: number }) {
    this.#clock = clock;
    this.#free = count;
    this.#patience = patience;
  }

  /** Begins `work` once there is a place. */
  async run(work: () => Promise<void>): Promise<void> {
    if (this.#free > 0) this.#free--;
    else await new Promise<void>((resolve) => this.#waiting.push(resolve));
    let held = true;
    const leave = () => {
      if (!held) return;
      held = false;
      // Handed over, so that nobody who comes just now gets in before who has waited.
      const next = this.#waiting.shift();
      if (next) next();
      else this.#free++;
    };
    const cancel = this.#clock.after(this.#patience, leave);
    try {
      await work();
    } finally {
      cancel();
      leave();
    }
  }
}
