import type { Instance, LifecycleEvent } from "../../main.ts";

/** Instances of one driver in one state. */
interface Cell {
  readonly state: string;
  readonly driver: string;
  count: number;
  /** Milliseconds that they and those before them have spent there. */
  spent: number;
}

/** How long instances are in which state, added up over all of them as time goes by. */
export class Phases {
  readonly #now: () => number;
  readonly #cells = new Map<string, Cell>();
  /** Where each instance is counted. */
  readonly #of = new Map<string, Cell>();
  #at: number;

  constructor(now: () => number) {
    this.#now = now;
    this.#at = now();
  }

  take({ to, instance_id, instance: { driver } }: LifecycleEvent): void {
    // By what is counted and not by what the event began with: it may be told after a count that has it already.
    const cell = this.#of.get(instance_id);
    if (cell ? cell.state === to : to === null) return;
    this.#pass();
    if (cell) cell.count--;
    this.#of.delete(instance_id);
    if (to !== null) this.#put(instance_id, to, driver);
  }

  /** Counts anew, which makes good for events that were missed, and returns what there is. */
  read(instances: readonly Instance[]): readonly Readonly<Cell>[] {
    this.#pass();
    for (const cell of this.#cells.values()) cell.count = 0;
    this.#of.clear();
    for (const { id, state, driver } of instances) this.#put(id, state, driver);
    return [...this.#cells.values()];
  }

  #put(id: string, state: string, driver: string): void {
    const cell = this.#cell(state, driver);
    cell.count++;
    this.#of.set(id, cell);
  }

  #pass(): void {
    const now = this.#now();
    const passed = Math.max(0, now - this.#at); // a clock that went back adds nothing
    this.#at = now;
    for (const cell of this.#cells.values()) cell.spent += cell.count * passed;
  }

  #cell(state: string, driver: string): Cell {
    const key = `${state} ${driver}`;
    let cell = this.#cells.get(key);
    if (!cell) this.#cells.set(key, cell = { state, driver, count: 0, spent: 0 });
    return cell;
  }
}
