import { isPromise } from "./async.ts";
import type { MaybePromise } from "./contracts.ts";

/** Stands in a queue for what did not fit: everything `from` one position `to` another, both missed. */
export interface Lagged {
  readonly from: number;
  readonly to: number;
}

class Gap implements Lagged {
  readonly from: number;
  to: number;
  constructor(from: number, to: number) {
    this.from = from;
    this.to = to;
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
}

/** Published items, the first of which was the channel's `first`th. */
interface Batch<E> {
  readonly items: readonly E[];
  readonly first: number;
}

/** Items are kept together until the next microtask; more than this many go into the bounded queues before. */
const BATCH = 1024;

/**
 * Hands what is published to every subscriber, each at its own pace. Publishing costs the same however many there are:
 * it keeps the item, and the next microtask shows all that was kept to one subscriber after the other.
 */
export class Channel<E> {
  /** Replaced, never changed: a flush goes on over the list that it began with. */
  #deliveries: readonly Delivery<E>[] = [];
  #batch: E[] = [];
  /** Of what is in no batch any more. */
  #published = 0;
  #scheduled = false;
  #flushing = false;

  get deliveries(): readonly Delivery<E>[] {
    this.#spill();
    return this.#deliveries;
  }

  publish(item: E): void {
    if (this.#batch.push(item) > BATCH) this.#spill();
    if (this.#scheduled) return;
    this.#scheduled = true;
    queueMicrotask(this.#flush);
  }

  /** @throws {RangeError} where the buffer is not a whole number above zero */
  subscribe(handle: (item: E) => MaybePromise<void>, options: DeliveryOptions): Delivery<E> {
    const delivery = new Delivery(handle, options, this.#published + this.#batch.length);
    this.#deliveries = [...this.#deliveries, delivery];
    return delivery;
  }

  /** Nothing is handed over any more. Resolves once the handler that is under way has ended. */
  unsubscribe(delivery: Delivery<E>): Promise<void> {
    this.#deliveries = this.#deliveries.filter((other) => other !== delivery);
    delivery.close();
    return delivery.idle();
  }

  /** Resolves to whether there was anything to wait for, once it has been handled. */
  async idle(): Promise<boolean> {
    const waited = this.#batch.length > 0 || this.#deliveries.some((delivery) => delivery.busy);
    await Promise.resolve(); // the flush was scheduled before, so it has run after this
    const busy = this.#deliveries.filter((delivery) => delivery.busy);
    await Promise.all(busy.map((delivery) => delivery.idle()));
    return waited || busy.length > 0;
  }

  #flush = (): void => {
    this.#scheduled = false;
    const batch = this.#take();
    this.#flushing = true;
    for (const delivery of this.#deliveries) delivery.deliver(batch);
    this.#flushing = false;
  };

  // Never from a handler in the middle of a flush: those whose turn is yet to come would get the later items first.
  #spill(): void {
    if (this.#batch.length === 0 || this.#flushing) return;
    const batch = this.#take();
    for (const delivery of this.#deliveries) delivery.queue(batch);
  }

  #take(): Batch<E> {
    const batch = { items: this.#batch, first: this.#published + 1 };
    this.#published += batch.items.length;
    this.#batch = [];
    return batch;
  }
}

/** One subscriber of a channel: hands items to its handler, one at a time and in order. */
export class Delivery<E> {
  readonly consumer: string;
  readonly #handle: (item: E) => MaybePromise<void>;
  readonly #options: DeliveryOptions;
  readonly #buffer: number;
  readonly #since: number;
  #queue: (E | Gap)[] = [];
  #head = 0;
  #running = false;
  #closed = false;
  #idle: (() => void)[] = [];

  /** `since` is how many items were published before, which are not for this subscriber. */
  constructor(handle: (item: E) => MaybePromise<void>, options: DeliveryOptions, since = 0) {
    if (!Number.isInteger(options.buffer) || options.buffer < 1) {
      throw new RangeError(`Cannot queue for "${options.consumer}": buffer is ${options.buffer}`);
    }
    this.consumer = options.consumer;
    this.#handle = handle;
    this.#options = options;
    this.#buffer = options.buffer;
    this.#since = since;
  }

  /** What waits now, a marker included. */
  get depth(): number {
    return this.#queue.length - this.#head;
  }

  /** Whether anything waits or a handler is under way. */
  get busy(): boolean {
    return this.#running || this.depth > 0;
  }

  /** Nothing is handed over any more, not even what waits. A handler under way goes on to its end. */
  close(): void {
    this.#closed = true;
    this.#clear();
  }

  /** Resolves once no handler is under way and nothing waits. */
  idle(): Promise<void> {
    return this.#running ? new Promise((resolve) => this.#idle.push(resolve)) : Promise.resolve();
  }

  /** Keeps for later what fits, at most `room` of the items from `start` on; the rest goes into a marker. */
  queue({ items, first }: Batch<E>, start = this.#startOf(first), room = this.#buffer - this.depth): void {
    if (this.#closed) return;
    const end = Math.max(start, Math.min(items.length, start + room));
    if (this.depth > 0) { for (let i = start; i < end; i++) this.#queue.push(items[i]); }
    else [this.#queue, this.#head] = [items.slice(start, end), 0];
    if (end >= items.length) return;
    this.#options.counts.dropped += items.length - end;
    const [from, to] = [end, items.length - 1].map((i) => positionOf(items[i], first + i));
    const last = this.#queue[this.#queue.length - 1];
    if (last instanceof Gap && this.depth > 0) last.to = to;
    else this.#queue.push(new Gap(from, to));
  }

  /** Hands the items over, after those that wait, for as long as the handler is synchronous; queues the rest. */
  deliver(batch: Batch<E>): void {
    if (this.#running) return this.queue(batch);
    if (this.depth > 0) {
      this.queue(batch);
      return this.#drain();
    }
    // Straight from the batch that all subscribers share: most handlers are synchronous, and need no queue at all.
    const { items } = batch;
    const start = this.#startOf(batch.first);
    const end = Math.min(items.length, start + this.#buffer);
    const handle = this.#handle;
    for (let i = start; i < end && !this.#closed; i++) {
      try {
        const pending: unknown = handle(items[i]);
        if (pending === undefined || !isPromise(pending)) continue;
        this.queue(batch, i + 1);
        return this.#resume(pending);
      } catch (error) {
        this.#fail(error);
      }
    }
    if (end >= items.length) return;
    this.queue(batch, end, 0);
    this.#drain();
  }

  #startOf(first: number): number {
    return Math.max(this.#since + 1 - first, 0);
  }

  #drain = (): void => {
    while (this.#head < this.#queue.length) {
      const pending = this.#call(this.#next());
      if (pending !== undefined) return this.#resume(pending);
    }
    this.#clear();
    this.#running = false;
    for (const resolve of this.#idle.splice(0)) resolve();
  };

  // Not an async function with a loop, which measures slower.
  #resume(pending: PromiseLike<unknown>): void {
    this.#running = true;
    Promise.resolve(pending).then(this.#drain, this.#failAndDrain);
  }

  #failAndDrain = (error: unknown): void => {
    this.#fail(error);
    this.#drain();
  };

  #call(next: E | Gap): PromiseLike<unknown> | undefined {
    try {
      const pending: unknown = next instanceof Gap ? this.#options.lagged(next) : this.#handle(next);
      return isPromise(pending) ? pending : undefined;
    } catch (error) {
      this.#fail(error);
    }
  }

  #next(): E | Gap {
    const next = this.#queue[this.#head++];
    if (this.#head >= this.#buffer) {
      this.#queue = this.#queue.slice(this.#head);
      this.#head = 0;
    }
    return next;
  }

  #clear(): void {
    this.#queue = [];
    this.#head = 0;
  }

  #fail(error: unknown): void {
    this.#options.counts.errors++;
    this.#options.failed(error);
  }
}

// Events that are numbered for good, as in the journal, keep their numbers, so that who lagged can ask for them.
function positionOf(item: unknown, published: number): number {
  const seq = (item as { seq?: unknown } | null | undefined)?.seq;
  return typeof seq === "number" ? seq : published;
}
