import type { Logger } from "@logtape/logtape";
import type { Instance, Origin } from "../../main.ts";
import { deadline, pooled } from "../shared/async.ts";
import { messageOf } from "../shared/errors.ts";
import { failure, isDoomed, type Registry, removeNow } from "./lifecycle.ts";
import { commitReading } from "./reading.ts";
import { LIVE } from "./states.ts";

/** Instances that are looked at side by side. */
const WIDTH = 64;
/** Milliseconds after which an instance gives its place to the next one; what was begun with it goes on in its lane. */
const SLOT = 45_000;
/** Milliseconds that the start of the host waits for all adoptions; those that are left go on behind it. */
const START_WITHIN = 60_000;
/** Reconciles in which every sleeping instance is looked at once: their exits are reported, this is the safety net. */
const SLOW_ROUND = 60;

/** Looks at the instance, finishes or undoes what was interrupted, and commits what changed by itself. */
export function look(registry: Registry, id: string, cause: string): Promise<void> {
  return registry.lanes.enter(id, "look", async () => {
    const instance = registry.records.find(id);
    if (!instance) return;
    await settle(registry, instance, "inspect", {
      actor: "system",
      cause: isDoomed(instance) ? `${instance.transition === "delete" ? "delete" : "undo"}_retried` : cause,
    });
  });
}

/**
 * Brings every row in line with what the hosts before this one left behind. Resolves when all are, or the host has waited
 * long enough: one driver that hangs must not keep it from starting.
 */
export async function adoptAll(registry: Registry, log: Logger): Promise<void> {
  const { records, lanes } = registry;
  const adopt = ({ id, name }: Instance) => {
    const turn = lanes.enter(id, "look", async () => {
      // What it is by now: an adoption that goes on behind the start may find that others were there first.
      const instance = records.find(id);
      if (instance) await settle(registry, instance, "adopt", { actor: "system", cause: "recovery" });
    });
    return deadline(turn, SLOT, "it").catch((error) => {
      log.error("Adopting instance {id} failed: {reason}", { id, name, reason: messageOf(error), error });
    });
  };
  await deadline(pooled(WIDTH, records.all(), adopt), START_WITHIN, "Adoption").catch((error) => {
    log.warn("{reason}; the rest of the instances is adopted while the host runs", { reason: messageOf(error) });
  });
}

/**
 * What is interrupted here was acknowledged to nobody. It is finished where it takes something away (stop, delete),
 * undone where it adds an instance (create, fork), and else judged by what the driver finds.
 */
async function settle(registry: Registry, instance: Instance, how: "inspect" | "adopt", origin: Origin): Promise<void> {
  if (isDoomed(instance)) return await removeNow(registry, instance, origin);
  const { transition } = instance;
  const reading = await registry.readings.read(instance, how);
  const commit = (found: typeof reading) =>
    void commitReading(registry, instance, found, origin, transition ? { interrupted: transition } : {});
  if (transition === "stop" && reading.state !== "Unknown") {
    try {
      const exit = await registry.driver(instance.driver).stop(instance, AbortSignal.timeout(SLOT));
      return commit({ state: "Stopped", ...exit });
    } catch (error) {
      commit(await registry.readings.read(instance));
      throw failure("stop", instance, error);
    }
  }
  if (transition === "fork" && reading.state === "Standby") {
    try {
      // It ran, and was put to sleep for its copy only.
      return commit({ state: await registry.driver(instance.driver).restore!(instance, AbortSignal.timeout(SLOT)) });
    } catch (error) {
      commit(reading);
      throw failure("restore", instance, error);
    }
  }
  commit(reading);
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
    const share = this.#round++ % SLOW_ROUND;
    const due = this.#registry.records.all().filter((instance, i) =>
      LIVE[instance.state] || isDoomed(instance) || i % SLOW_ROUND === share
    );
    await pooled(WIDTH, due, ({ id }) => this.#look(id));
  }

  [Symbol.dispose](): void {
    clearTimeout(this.#timer);
    this.#timer = undefined;
  }

  #look = async (id: string): Promise<void> => {
    const closed = this.#timer === undefined;
    if (closed || this.#registry.lanes.pending(id).length > 0) return;
    try {
      await deadline(look(this.#registry, id, "reconcile"), SLOT, "it");
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
