export interface Bounds {
  /** Connections that may wait for one instance, and for all together. */
  readonly each: number;
  readonly total: number;
}

/** Counts the connections that wait, and says when there are too many. */
export class Holding {
  readonly #bounds: Bounds;
  readonly #each = new Map<string, number>();
  #total = 0;

  constructor(bounds: Bounds) {
    this.#bounds = bounds;
  }

  get total(): number {
    return this.#total;
  }

  of(id: string): number {
    return this.#each.get(id) ?? 0;
  }

  /** Takes a place; what gives it back, once, or undefined where there is none. */
  enter(id: string): (() => void) | undefined {
    const held = this.of(id);
    if (held >= this.#bounds.each || this.#total >= this.#bounds.total) return undefined;
    this.#each.set(id, held + 1);
    this.#total++;
    let left = false;
    return () => {
      if (left) return;
      left = true;
      this.#total--;
      const rest = this.of(id) - 1;
      if (rest === 0) this.#each.delete(id);
      else this.#each.set(id, rest);
    };
  }
}
