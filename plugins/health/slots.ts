import { clearImmediate, setImmediate } from "node:timers";

/** Begun in one turn of the event loop: opening a connection takes its time, and others have things to do too. */
const BURST = 8;

/** Runs work for items, so many at a time. Whoever waits longest is next, so nobody waits for ever. */
export class Slots<T> {
  readonly #limit: number;
  readonly #work: (item: T) => Promise<void>;
  readonly #urgent = new Set<T>();
  readonly #waiting = new Set<T>();
  readonly #running = new Set<Promise<void>>();
  /** Of this turn. */
  #begun = 0;
  #turn: NodeJS.Immediate | undefined;
  #closed = false;

  /** `work` never rejects. */
  constructor(limit: number, work: (item: T) => Promise<void>) {
    this.#limit = limit;
    this.#work = work;
  }

  get running(): number {
    return this.#running.size;
  }

  get waiting(): number {
    return this.#urgent.size + this.#waiting.size;
  }

  has(item: T): boolean {
    return this.#urgent.has(item) || this.#waiting.has(item);
  }

  /** An item that waits already is not taken twice; `urgent` lets it pass the others. */
  offer(item: T, { urgent = false } = {}): void {
    if (this.#closed) return;
    if (urgent) {
      this.#waiting.delete(item);
      this.#urgent.add(item);
    } else if (!this.has(item)) this.#waiting.add(item);
    this.#pump();
  }

  withdraw(item: T): void {
    this.#urgent.delete(item);
    this.#waiting.delete(item);
  }

  /** Nothing is begun from here on; resolves once what was has ended. */
  async close(): Promise<void> {
    this.#closed = true;
    clearImmediate(this.#turn);
    this.#urgent.clear();
    this.#waiting.clear();
    await Promise.all(this.#running);
  }

  // Without the bound, timers that a busy moment has held up ring together, and do so again in every interval after it.
  #pump(): void {
    while (this.#running.size < this.#limit && this.#begun < BURST && !this.#closed) {
      const [item] = this.#urgent.size > 0 ? this.#urgent : this.#waiting;
      if (item === undefined) return;
      this.withdraw(item);
      this.#begun++;
      this.#turn ??= setImmediate(this.#nextTurn);
      const run = this.#work(item).finally(() => {
        this.#running.delete(run);
        this.#pump();
      });
      this.#running.add(run);
    }
  }

  #nextTurn = (): void => {
    this.#turn = undefined;
    this.#begun = 0;
    this.#pump();
  };
}
