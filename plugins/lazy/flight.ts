import type { Lease } from "./leases.ts";

/** What who acquires an instance is given. */
export interface Acquired {
  readonly lease: Lease;
  /** Milliseconds from the request to the lease. */
  readonly latency: number;
  /** Whether it was started or restored for this. */
  readonly started: boolean;
}

interface Waiter {
  readonly ttl: number;
  readonly began: number;
  resolve(acquired: Acquired): void;
  reject(reason: unknown): void;
}

/** One way of an instance to being ready, and all who wait for its end. It goes on when any of them leaves. */
export class Flight {
  readonly began = performance.now();
  /** Whether it has to be started, as far as could be told at first, or was. */
  starts: boolean;
  /** A start or a restore of ours was carried out. */
  raised = false;
  readonly #waiters = new Set<Waiter>();

  constructor(starts: boolean) {
    this.starts = starts;
  }

  get waiting(): number {
    return this.#waiters.size;
  }

  /** Resolves with a lease of `ttl` milliseconds; rejects when the signal aborts first, and then there is no lease. */
  join(ttl: number, signal: AbortSignal): Promise<Acquired> {
    return new Promise((resolve, reject) => {
      const leave = () => {
        this.#waiters.delete(waiter);
        reject(signal.reason);
      };
      const stay = () => signal.removeEventListener("abort", leave);
      const waiter: Waiter = {
        ttl,
        began: performance.now(),
        resolve: (acquired) => (stay(), resolve(acquired)),
        reject: (reason) => (stay(), reject(reason)),
      };
      if (signal.aborted) return reject(signal.reason);
      this.#waiters.add(waiter);
      signal.addEventListener("abort", leave, { once: true });
    });
  }

  /** Leases for all who still wait; `keep` writes them to disk before anybody is told. */
  land(grant: (ttl: number) => Lease, keep: (granted: readonly Lease[]) => void): void {
    const waiters = [...this.#waiters];
    const leases = waiters.map(({ ttl }) => grant(ttl));
    keep(leases);
    const now = performance.now();
    waiters.forEach(({ began, resolve }, i) =>
      resolve({ lease: leases[i], latency: now - began, started: this.raised })
    );
  }

  fail(reason: unknown): void {
    for (const { reject } of this.#waiters) reject(reason);
  }
}
