import type { Clock } from "../plugins/shared/clock.ts";

/** Time that passes when a test says so. */
export class ManualClock implements Clock {
  #timers = new Set<{ at: number; call: () => void }>();
  #passed = 0;
  #wall: number;

  constructor(wall = Date.UTC(2030, 0, 1)) {
    this.#wall = wall;
  }

  now = (): number => this.#wall + this.#passed;
  after = (ms: number, call: () => void): () => void => {
    const timer = { at: this.#passed + Math.max(ms, 0), call };
    this.#timers.add(timer);
    return () => void this.#timers.delete(timer);
  };

  get timers(): number {
    return this.#timers.size;
  }

  /** Lets `ms` pass, timer by timer, and what each of them begins. */
  async pass(ms: number): Promise<void> {
    const end = this.#passed + ms;
    for (;;) {
      await settle();
      const [next] = [...this.#timers].filter(({ at }) => at <= end).sort((a, b) => a.at - b.at);
      if (!next) break;
      this.#timers.delete(next);
      this.#passed = Math.max(this.#passed, next.at);
      next.call();
    }
    this.#passed = end;
    await settle();
  }

  /** Sets the wall clock forwards or back, which no timer notices. */
  step(ms: number): void {
    this.#wall += ms;
  }
}

/** Lets everything run on that waits for nothing but its turn. */
export async function settle(turns = 3): Promise<void> {
  for (let i = 0; i < turns; i++) await new Promise<void>((resolve) => setImmediate(resolve));
}
