import type { Logger } from "@logtape/logtape";
import type { Instance, LifecycleEvent, PluginHooks, State, WaitResult } from "../../main.ts";
import { DormouseError } from "../../main.ts";
import { messageOf } from "../shared/errors.ts";
import { look, type Registry } from "./lifecycle.ts";
import { OUTCOME, type Request, TERMINAL } from "./states.ts";

/** How often the driver is asked while somebody waits, in milliseconds. */
const ASK_EVERY = 5_000;

interface Waiter {
  readonly target: State;
  settle(outcome: WaitResult | DormouseError): void;
}

/** Those who wait for one instance, and the timer that asks its driver for them all. */
interface Room {
  readonly waiters: Set<Waiter>;
  readonly timer: ReturnType<typeof setInterval>;
}

/** Everyone who waits for a state: one subscription to the events serves them all. */
export class Waiting {
  readonly #registry: Registry;
  readonly #log: Logger;
  readonly #rooms = new Map<string, Room>();

  constructor(registry: Registry, hooks: PluginHooks, log: Logger) {
    this.#registry = registry;
    this.#log = log;
    hooks.on("instance:event", this.#notify, { consumer: "wait_for_state", buffer: 4096, lagged: this.#recheck });
  }

  /**
   * Resolves when the instance is in the target state, when it cannot get there by what is under way, or when `timeout`
   * milliseconds are over; an aborted `signal` counts as the timeout.
   *
   * @throws {DormouseError} `not_found` when the instance is gone, or goes while waiting
   */
  wait(id: string, target: State, { timeout, signal }: { timeout: number; signal?: AbortSignal }): Promise<WaitResult> {
    return new Promise((resolve, reject) => {
      const expire = () =>
        waiter.settle(this.#now(id, (instance) => ({ ...shown(instance), timed_out: instance.state !== target })));
      const timer = setTimeout(expire, timeout);
      const waiter: Waiter = {
        target,
        settle: (outcome) => {
          clearTimeout(timer);
          signal?.removeEventListener("abort", expire);
          this.#leave(id, waiter);
          if (outcome instanceof DormouseError) reject(outcome);
          else resolve(outcome);
        },
      };
      this.#enter(id, waiter);
      signal?.addEventListener("abort", expire, { once: true });
      // Only now that the waiter is in place: a change between a check and a later subscription would be missed.
      this.#check(id, waiter);
      if (signal?.aborted) expire();
    });
  }

  /** How many wait now. */
  get size(): number {
    return [...this.#rooms.values()].reduce((sum, { waiters }) => sum + waiters.size, 0);
  }

  #notify = ({ instance_id, instance, to }: LifecycleEvent): void => {
    for (const waiter of [...this.#rooms.get(instance_id)?.waiters ?? []]) {
      // The event's own state first: an instance may be past it by the time the event is handled.
      if (to === waiter.target) waiter.settle({ ...shown(instance), timed_out: false });
      else this.#check(instance_id, waiter);
    }
  };

  #recheck = (): void => {
    for (const [id, { waiters }] of [...this.#rooms]) for (const waiter of [...waiters]) this.#check(id, waiter);
  };

  #check(id: string, waiter: Waiter): void {
    const outcome = this.#now(id, (instance) => {
      const reached = instance.state === waiter.target;
      return reached || this.#stuck(instance, waiter.target) ? { ...shown(instance), timed_out: false } : undefined;
    });
    if (outcome) waiter.settle(outcome);
  }

  /** Whether the instance rests in another state and nothing that was asked of it leads to the target or deletes it. */
  #stuck({ id, state }: Instance, target: State): boolean {
    if (!TERMINAL[state]) return false;
    const pending = this.#registry.lanes.pending(id);
    return !pending.some((work) => work === "delete" || OUTCOME[work as Request] === target);
  }

  #now<T>(id: string, of: (instance: Instance) => T): T | DormouseError {
    const instance = this.#registry.records.find(id);
    return instance ? of(instance) : new DormouseError("not_found", "The instance was deleted while waiting");
  }

  #enter(id: string, waiter: Waiter): void {
    let room = this.#rooms.get(id);
    if (!room) {
      const timer = setInterval(() => {
        look(this.#registry, id, "wait").catch((error) =>
          this.#log.debug("Looking at {id} failed: {reason}", { id, reason: messageOf(error), error })
        );
      }, ASK_EVERY);
      this.#rooms.set(id, room = { waiters: new Set(), timer });
    }
    room.waiters.add(waiter);
  }

  #leave(id: string, waiter: Waiter): void {
    const room = this.#rooms.get(id);
    if (!room?.waiters.delete(waiter) || room.waiters.size > 0) return;
    clearInterval(room.timer);
    this.#rooms.delete(id);
  }
}

function shown({ state, state_error }: Instance): Pick<WaitResult, "state" | "state_error"> {
  return { state, state_error };
}
