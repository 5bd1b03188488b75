const FIRST = 100;
const LONGEST = 5_000;

/** How long to wait before each attempt to connect again: at once, then 100 ms, doubling to 5 s. */
export class Backoff {
  #next = 0;
  #connectedAt: number | undefined;

  connected(): void {
    this.#connectedAt = performance.now();
  }

  /** Milliseconds. What had been connected for as long as the longest wait begins anew. */
  next(): number {
    if (this.#connectedAt !== undefined && performance.now() - this.#connectedAt > LONGEST) this.#next = 0;
    this.#connectedAt = undefined;
    const wait = this.#next;
    this.#next = Math.min(Math.max(FIRST, wait * 2), LONGEST);
    return wait;
  }
}
