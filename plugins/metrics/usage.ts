import type { Logger } from "@logtape/logtape";
import type { Hypervisor, Instance, State, Stats } from "../../main.ts";
import { abortable, deadline, delay, pooled } from "../shared/async.ts";
import type { Clock } from "../shared/clock.ts";
import { messageOf } from "../shared/errors.ts";

/** Readings under way at a time. */
const WIDTH = 8;
/** Milliseconds that a reading may take before it counts as late. Until it ends no other of the instance is begun. */
const LATE = 2_000;
/** Milliseconds of readings in a row before everybody else has their turn on the loop. */
const SLICE = 4;
/** Milliseconds of readings that the scrape itself bears; what is left is read after it, with a `PAUSE` for each slice. */
const AT_ONCE = 16;
const PAUSE = 40;
/** Milliseconds that a scrape waits for readings that are slow without using the loop. */
const WAIT = 500;
/** In which nothing is woken, and nothing that was taken out of memory is brought back, by a look at it. */
const AWAKE: ReadonlySet<State> = new Set(["Initializing", "Running", "Paused"]);

export interface UsageOptions {
  hypervisor: Hypervisor;
  clock: Clock;
  log: Logger;
  signal: AbortSignal;
  /** Instances that have labels of their own. */
  budget: number;
  /** Milliseconds for which readings are good. */
  maxAge: number;
  /** Milliseconds since the epoch: what was used before by those that are summed is not counted. */
  since: number;
  read(result: "ok" | "failed" | "late"): void;
}

/** What an instance has used: these never go down, whatever is started anew. */
export interface Totals {
  cpu_seconds: number;
  network_rx_bytes: number;
  network_tx_bytes: number;
}
const TOTALS = ["cpu_seconds", "network_rx_bytes", "network_tx_bytes"] as const;
const NONE: Readonly<Totals> = { cpu_seconds: 0, network_rx_bytes: 0, network_tx_bytes: 0 };

interface Usage {
  readonly totals: Totals;
  last: Stats;
  /** Of the instance when it was read: with another start, what drivers count begins anew. */
  started_at: number | null;
  at: number;
}
interface Pass {
  /** Until what a scrape bears is read. */
  readonly atOnce: Promise<void>;
  readonly all: Promise<void>;
}

/** What instances use: some by themselves, the others summed. */
export interface UsageView {
  readonly labelled: readonly { instance: Instance; totals: Readonly<Totals>; memory: number | null }[];
  readonly others: { count: number; totals: Readonly<Totals>; memory: number };
}

/**
 * Reads what instances use, only when somebody asks, and at most every so often. Those created first have labels of their
 * own, as many as the budget allows: an instance that has them keeps them as long as it exists, whatever else is created,
 * deleted or started anew, this host included.
 */
export class Usages {
  readonly #options: UsageOptions;
  readonly #usages = new Map<string, Usage>();
  /** Readings that have not ended, those included that nobody waits for any more. */
  readonly #underWay = new Set<string>();
  readonly #others: Totals = { ...NONE };
  #begun = -Infinity;
  #pass: Pass | undefined;

  constructor(options: UsageOptions) {
    this.#options = options;
  }

  /** Resolves once the readings are new enough, or as many are as one caller may wait for. */
  async refresh(): Promise<void> {
    const { clock, maxAge, signal } = this.#options;
    if (!this.#pass && clock.now() - this.#begun >= maxAge && !signal.aborted) {
      this.#begun = clock.now();
      this.#pass = this.#readAll();
      void this.#pass.all.finally(() => this.#pass = undefined);
    }
    await this.#pass?.atOnce;
  }

  view(): UsageView {
    const { hypervisor, budget } = this.#options;
    const instances = hypervisor.list();
    const labelled = instances.slice(0, budget).flatMap((instance) => {
      const usage = this.#usages.get(instance.id);
      return usage ? [{ instance, totals: usage.totals, memory: this.#memoryOf(instance) }] : [];
    });
    const rest = instances.slice(budget);
    const memory = rest.reduce((sum, instance) => sum + (this.#memoryOf(instance) ?? 0), 0);
    return { labelled, others: { count: rest.length, totals: this.#others, memory } };
  }

  /** Resolves once nothing is read any more, which the signal has begun. */
  async close(): Promise<void> {
    await this.#pass?.all;
  }

  #memoryOf({ id, state }: Instance): number | null {
    return AWAKE.has(state) ? this.#usages.get(id)?.last.memory_rss_bytes ?? null : null;
  }

  #readAll(): Pass {
    const { hypervisor, budget, signal } = this.#options;
    const instances = hypervisor.list();
    const there = new Set(instances.map(({ id }) => id));
    for (const id of this.#usages.keys()) if (!there.has(id)) this.#usages.delete(id);
    const labelled = new Set(instances.slice(0, budget).map(({ id }) => id));
    const drivers = new Map(hypervisor.drivers().map((driver) => [driver.name, driver]));
    const can = ({ driver }: Instance) => drivers.get(driver)?.features.has("stats") ?? false;
    const at = ({ id }: Instance) => this.#usages.get(id)?.at ?? -Infinity;
    const queue = instances.filter((each) => isAwake(each) && can(each) && !this.#underWay.has(each.id))
      .sort((a, b) => at(a) - at(b)); // what there was no time for comes first

    const enough = Promise.withResolvers<void>();
    const timer = setTimeout(enough.resolve, WAIT);
    let [slice, spent] = [0, 0];
    let rest: Promise<void> | undefined;
    const turn = async () => {
      while (slice >= SLICE) {
        if (spent >= AT_ONCE) enough.resolve();
        rest ??= delay(spent >= AT_ONCE ? PAUSE : 0).then(() => {
          slice = 0;
          rest = undefined;
        });
        await rest;
      }
    };
    const all = pooled(WIDTH, queue, async (instance) => {
      await turn();
      if (signal.aborted) return;
      // Drivers read files without a pause, so this is what they keep the loop busy for.
      const began = performance.now();
      const reading = this.#read(instance, labelled.has(instance.id));
      const took = performance.now() - began;
      slice += took;
      spent += took;
      await reading;
    }).finally(() => {
      clearTimeout(timer);
      enough.resolve();
    });
    return { atOnce: enough.promise, all };
  }

  async #read({ id, name }: Instance, labelled: boolean): Promise<void> {
    const { hypervisor, signal, log, read, clock } = this.#options;
    const instance = hypervisor.find(id);
    // Since the list was made it may have gone to sleep.
    if (!instance || !isAwake(instance)) return;
    try {
      const reading = hypervisor.driverOf(instance, "stats").stats(instance);
      this.#underWay.add(id);
      const ended = () => void this.#underWay.delete(id);
      reading.then(ended, ended);
      const stats = await deadline(abortable(reading, signal), LATE, "Reading what it uses");
      if (hypervisor.find(id)) {
        this.#take(id, { last: stats, started_at: instance.started_at, at: clock.now() }, labelled);
      }
      read("ok");
    } catch (error) {
      if (signal.aborted) return;
      // It may just have stopped, which its driver tells by an error too: so this is worth a number, and no warning.
      read(error instanceof DOMException && error.name === "TimeoutError" ? "late" : "failed");
      log.debug("Cannot read what instance {name} uses: {reason}", { name, id, reason: messageOf(error), error });
    }
  }

  #take(id: string, fresh: Omit<Usage, "totals">, labelled: boolean): void {
    const before = this.#usages.get(id);
    const totals = { ...before?.totals ?? NONE };
    // Those that ran before this host come into the sum one after the other, and their past would look like a burst.
    const past = before === undefined && (fresh.started_at ?? 0) < this.#options.since;
    for (const key of TOTALS) {
      const from = before && before.started_at === fresh.started_at ? before.last[key] : 0;
      // Less than before where a process of it has ended: what that one used is told already.
      const more = Math.max(0, fresh.last[key] - from);
      totals[key] += more;
      if (!labelled && !past) this.#others[key] += more;
    }
    this.#usages.set(id, { ...fresh, totals });
  }
}

function isAwake({ state, transition }: Instance): boolean {
  return AWAKE.has(state) && transition === null;
}
