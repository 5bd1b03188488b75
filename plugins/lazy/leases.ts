import { createId } from "@paralleldrive/cuid2";
import { endOf, settled, type Span } from "../shared/clock.ts";

/** Somebody's need of an instance, for `ms` milliseconds from `from`. */
export interface Lease extends Span {
  readonly id: string;
}

/** The leases of one instance. It has no clock: each question says when it is asked. */
export class Leases {
  readonly #leases: Map<string, Lease>;

  constructor(kept: readonly Lease[] = []) {
    this.#leases = new Map(kept.map((lease) => [lease.id, lease]));
  }

  /** Those that are over, and that nobody has looked at since, included. */
  get size(): number {
    return this.#leases.size;
  }

  /** Whether any has not ended. */
  held(now: number): boolean {
    return this.nextEnd(now) > now;
  }

  grant(ms: number, now: number): Lease {
    return this.#set({ id: createId(), from: now, ms });
  }

  /** Begins anew, for its own time where no other is given. Undefined where there is none, or it is over. */
  renew(id: string, ms: number | undefined, now: number): Lease | undefined {
    this.expire(now);
    const lease = this.#leases.get(id);
    return lease && this.#set({ id, from: now, ms: ms ?? lease.ms });
  }

  /** Whether there was one that had not ended. */
  release(id: string, now: number): boolean {
    this.expire(now);
    return this.#leases.delete(id);
  }

  clear(): void {
    this.#leases.clear();
  }

  /** Forgets those that are over; when the last of these ended, null where none was. */
  expire(now: number): number | null {
    let last: number | null = null;
    for (const lease of [...this.#leases.values()]) {
      const end = endOf(this.#set(settled(lease, now)));
      if (end > now) continue;
      this.#leases.delete(lease.id);
      last = Math.max(last ?? end, end);
    }
    return last;
  }

  /** When the first of them ends, `-Infinity` where there is none; those that a clock set back has put off are settled. */
  nextEnd(now: number): number {
    const ends = [...this.#leases.values()].map((lease) => endOf(settled(lease, now))).filter((end) => end > now);
    return ends.length === 0 ? -Infinity : Math.min(...ends);
  }

  /** As they are kept on disk. */
  list(): Lease[] {
    return [...this.#leases.values()];
  }

  #set(lease: Lease): Lease {
    this.#leases.set(lease.id, lease);
    return lease;
  }
}
