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
  #at: number;

  constructor(now: () => number) {
    this.#now = now;
    this.#at = now();
  }

  take({ from, to, instance: { driver } }: LifecycleEvent): void {
    if (from === to) return;
    this.#pass();
    if (from !== null) this.#cell(from, driver).count--;
    if (to !== null) this.#cell(to, driver).count++;
  }

  /** Counts anew, which makes good for events that were missed, and returns what there is. */
  read(instances: readonly Instance[]): readonly Readonly<Cell>[] {
    this.#pass();
    for (const cell of this.#cells.values()) cell.count = 0;
    for (const { state, driver } of instances) this.#cell(state, driver).count++;
    return [...this.#cells.values()];
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
