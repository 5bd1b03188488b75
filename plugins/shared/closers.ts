import type { MaybePromise } from "./contracts.ts";

type Closer = () => MaybePromise<void>;

/** What one plugin registered, to be undone last in first out when it closes. */
export class Closers {
  #waiting = new Set<Closer>();
  #late: ((closer: Closer) => Promise<void>) | undefined;

  get size(): number {
    return this.#waiting.size;
  }

  /** Returns what forgets the closer again, for what is undone before its plugin closes. */
  add(closer: Closer): () => void {
    // A setup that ran past its deadline goes on, and what it still opens must not outlive the host.
    if (this.#late) void this.#late(closer);
    else this.#waiting.add(closer);
    return () => void this.#waiting.delete(closer);
  }

  /** Hands each closer to `step`, one at a time; those that are added from here on too, at once. */
  async close(step: (closer: Closer) => Promise<void>): Promise<void> {
    this.#late = step;
    for (const closer of [...this.#waiting].reverse()) {
      if (this.#waiting.delete(closer)) await step(closer);
    }
  }
}
