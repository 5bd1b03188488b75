export interface FlapOptions {
  /** Wakes after an automatic sleep, within `window`, from which on an instance counts as flapping; 0 turns it off. */
  cycles: number;
  /** Milliseconds. */
  window: number;
  /** Milliseconds that the first wake too many keeps it awake; each further one keeps it twice as long. */
  backoff: number;
  /** Milliseconds, at most. */
  backoffMax: number;
}

/** Notices an instance that is put to sleep and woken again and again, and says how long to leave it awake for. */
export class FlapDetector {
  readonly #options: FlapOptions;
  #wakes: number[] = [];
  #level = 0;

  constructor(options: FlapOptions) {
    this.#options = options;
  }

  /** Cycles of the current window, as of the last wake. */
  get cycles(): number {
    return this.#wakes.length;
  }

  /** Counts a wake at `now`; the milliseconds to stay awake for it, 0 where all is well. */
  woken(now: number): number {
    const { cycles, window, backoff, backoffMax } = this.#options;
    if (cycles === 0) return 0;
    // A wake from the future was noted before the clock stepped back, and says nothing about this window.
    this.#wakes = this.#wakes.filter((at) => at <= now && at > now - window);
    this.#wakes.push(now);
    if (this.#wakes.length > cycles) this.#wakes.shift();
    // The back-off itself thins the wakes out: it goes only once they are well below what began it.
    if (this.#wakes.length * 2 <= cycles) this.#level = 0;
    if (this.#wakes.length < cycles) return 0;
    return Math.min(backoff * 2 ** this.#level++, backoffMax);
  }
}
