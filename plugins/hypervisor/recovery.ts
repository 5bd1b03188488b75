import { pooled } from "../shared/async.ts";
import type { Logger } from "@logtape/logtape";
import type { Instance, Origin } from "../../main.ts";
import { messageOf } from "../shared/errors.ts";
import { commitReading, look, read, type Registry, removeNow } from "./lifecycle.ts";
import { LIVE } from "./states.ts";

/** Instances that are looked at side by side. */
const WIDTH = 64;
/** Reconciles in which every sleeping instance is looked at once: their exits are reported, this is the safety net. */
const SLOW_ROUND = 60;

const RECOVERY: Origin = { actor: "system", cause: "recovery" };

/**
 * Brings every row in line with what the hosts before this one left behind. What was interrupted before it was
 * acknowledged is finished where it takes something away (stop, delete), undone where it adds an instance (create,
 * fork), and else judged by what the driver finds.
 */
export async function adoptAll(registry: Registry, log: Logger): Promise<void> {
  await pooled(
    WIDTH,
    registry.records.all(),
    (instance) =>
      registry.lanes.enter(instance.id, "look", () => adopt(registry, instance)).catch((error) => {
        const reason = messageOf(error);
        log.error("Adopting instance {id} failed: {reason}", { id: instance.id, name: instance.name, reason, error });
      }),
  );
}

async function adopt(registry: Registry, instance: Instance): Promise<void> {
  const { transition } = instance;
  if (transition === "create" || transition === "fork") return await removeNow(registry, instance, RECOVERY);
  if (transition === "delete") return await removeNow(registry, instance, RECOVERY);
  const reading = await read(registry, instance, "adopt");
  if (transition === "stop" && reading.state !== "Unknown") {
    const exit = await registry.driver(instance.driver).stop(instance, AbortSignal.timeout(60_000));
    commitReading(registry, instance.id, { state: "Stopped", ...exit }, RECOVERY, { interrupted: "stop" });
    return;
  }
  commitReading(registry, instance.id, reading, RECOVERY, transition ? { interrupted: transition } : {});
}

/** Looks at the instances again and again, so that what no driver reported is noticed all the same. */
export class Reconciler implements Disposable {
  readonly #registry: Registry;
  readonly #log: Logger;
  readonly #interval: number;
  #timer: ReturnType<typeof setTimeout> | undefined;
  #round = 0;

  /** `interval` in milliseconds, from the end of one reconcile to the begin of the next. */
  constructor(registry: Registry, log: Logger, { interval }: { interval: number }) {
    this.#registry = registry;
    this.#log = log;
    this.#interval = interval;
    this.#arm();
  }

  /** Every live instance that nobody works on, and a share of the sleeping ones. */
  async run(): Promise<void> {
    const { records, lanes } = this.#registry;
    const share = this.#round++ % SLOW_ROUND;
    const due = records.all().filter(({ id, state, transition }, i) => {
      const wanted = LIVE[state] || transition === "delete" || i % SLOW_ROUND === share;
      return wanted && lanes.pending(id).length === 0;
    });
    await pooled(WIDTH, due, ({ id }) => this.#look(id));
  }

  [Symbol.dispose](): void {
    clearTimeout(this.#timer);
    this.#timer = undefined;
  }

  #look = async (id: string): Promise<void> => {
    try {
      await look(this.#registry, id, "reconcile");
    } catch (error) {
      this.#log.warn("Reconciling instance {id} failed: {reason}", { id, reason: messageOf(error), error });
    }
  };

  #arm(): void {
    this.#timer = setTimeout(() => {
      void this.run().finally(() => {
        if (this.#timer !== undefined) this.#arm();
      });
    }, this.#interval);
  }
}
