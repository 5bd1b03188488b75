import type { MaybePromise } from "./contracts.ts";

/** Stands in a queue for what did not fit: everything `from` one position `to` another, both missed. */
export interface Lagged {
  readonly from: number;
  readonly to: number;
}

class Gap implements Lagged {
  readonly from: number;
  to: number;
  constructor(position: number) {
    this.from = this.to = position;
  }
}

export interface DeliveryOptions {
  /** The name that its counts are kept under. */
  consumer: string;
  /** Items that may wait, at least 1; behind them waits at most one marker for what did not fit. */
  buffer: number;
  /** Shared by all deliveries of the consumer. */
  counts: { dropped: number; errors: number };
  lagged(gap: Lagged): MaybePromise<void>;
  failed(error: unknown): void;
  /** Runs `drain` soon, outside the publisher's call. */
  wake(drain: () => void): void;
}

/** Hands items to one handler, one at a time and in order, through a bounded queue that never blocks who pushes. */
export class Delivery<E> {
  readonly consumer: string;
  readonly #handle: (item: E) => MaybePromise<void>;
  readonly #options: DeliveryOptions;
  #queue: (E | Gap)[] = [];
  #head = 0;
  #running = false;
  #closed = false;
  #idle: (() => void)[] = [];

  constructor(handle: (item: E) => MaybePromise<void>, options: DeliveryOptions) {
    if (!Number.isInteger(options.buffer) || options.buffer < 1) {
      throw new RangeError(`Cannot queue for "${options.consumer}": buffer is ${options.buffer}`);
    }
    this.consumer = options.consumer;
    this.#handle = handle;
    this.#options = options;
  }

  /** What waits now, a marker included. */
  get depth(): number {
    return this.#queue.length - this.#head;
  }

  /** Queues an item; `position` is what a marker says of it if it does not fit. */
  push(item: E, position: number): void {
    if (this.#queue.length - this.#head < this.#options.buffer) this.#queue.push(item);
    else this.#miss(position);
    if (this.#running) return;
    this.#running = true;
    this.#options.wake(this.#drain);
  }

  /** Nothing is handed over any more, not even what waits. A handler under way goes on to its end. */
  close(): void {
    this.#closed = true;
  }

  /** Resolves once nothing waits and no handler runs. */
  idle(): Promise<void> {
    return this.#running ? new Promise((resolve) => this.#idle.push(resolve)) : Promise.resolve();
  }

  #miss(position: number): void {
    this.#options.counts.dropped++;
    const last = this.#queue[this.#queue.length - 1];
    if (last instanceof Gap) last.to = position;
    else this.#queue.push(new Gap(position));
  }

  // Goes from one synchronous handler to the next without a tick in between, which is where the speed comes from.
  #drain = (): void => {
    while (this.#head < this.#queue.length && !this.#closed) {
      const next = this.#queue[this.#head++];
      if (this.#head >= this.#options.buffer) this.#compact();
      try {
        const pending = next instanceof Gap ? this.#options.lagged(next) : this.#handle(next);
        if (pending) return void pending.then(this.#drain, this.#failAndDrain);
      } catch (error) {
        this.#fail(error);
      }
    }
    this.#queue = [];
    this.#head = 0;
    this.#running = false;
    for (const resolve of this.#idle.splice(0)) resolve();
  };

  #compact(): void {
    this.#queue = this.#queue.slice(this.#head);
    this.#head = 0;
  }

  #fail(error: unknown): void {
    this.#options.counts.errors++;
    this.#options.failed(error);
  }

  #failAndDrain = (error: unknown): void => {
    this.#fail(error);
    this.#drain();
  };
}
