import type { Conntrack, Flow } from "../../main.ts";
import type { Epoch } from "./active.ts";

/** The kernel's table at one moment, by the address that a flow goes to. */
export interface Snapshot {
  readonly epoch: number;
  readonly flows: ReadonlyMap<string, readonly Flow[]>;
}

/** Dumps of the kernel's table, one at a time, each for all who asked before it began. */
export class Dumps {
  readonly epoch: Epoch = { latest: 0, underWay: 0 };
  readonly #conntrack: Conntrack;
  readonly #merge: (snapshot: Snapshot) => void;
  #current: Promise<void> | undefined;
  #next: Promise<void> | undefined;

  /** Every dump is handed to `merge` before those who asked for it go on. */
  constructor(conntrack: Conntrack, merge: (snapshot: Snapshot) => void) {
    this.#conntrack = conntrack;
    this.#merge = merge;
  }

  /** Resolves once a dump that began after this call is merged. @throws where the kernel does not answer */
  take(): Promise<void> {
    return this.#next ??= this.#queue();
  }

  /** Resolves once no dump is under way. */
  async idle(): Promise<void> {
    await Promise.allSettled([this.#current, this.#next]);
  }

  async #queue(): Promise<void> {
    await Promise.allSettled([this.#current]);
    this.#next = undefined;
    this.#current = this.#take();
    return await this.#current;
  }

  async #take(): Promise<void> {
    const epoch = ++this.epoch.latest;
    this.epoch.underWay++;
    try {
      const flows = Map.groupBy(await this.#conntrack.dump(), (flow) => flow.destination);
      this.#merge({ epoch, flows });
    } finally {
      this.epoch.underWay--;
    }
  }
}
