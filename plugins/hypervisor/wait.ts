import type { Logger } from "@logtape/logtape";
import type { Instance, LifecycleEvent, PluginHooks, State, WaitResult } from "../../main.ts";
import { DormouseError } from "../../main.ts";
import { messageOf } from "../shared/errors.ts";
import type { Work } from "./lanes.ts";
import type { Registry } from "./lifecycle.ts";
import { look } from "./recovery.ts";
import { OUTCOME, type Request, TERMINAL } from "./states.ts";

/** How often the driver is asked while somebody waits, in milliseconds. */
const ASK_EVERY = 5_000;
/** Beyond it `setTimeout` overflows and fires at once. */
const LONGEST_TIMER = 2 ** 31 - 1;
/** Work in a lane that leads out of any state: where it is under way, nobody gives up yet. */
const LEADS_ANYWHERE: readonly Work[] = ["create", "fork", "delete"];

interface Waiter {
  readonly target: State;
  readonly deadline: number;
  settle(outcome: WaitResult | DormouseError): void;
}

/** Those who wait for one instance, with one timer that asks its driver and one for the soonest deadline of them all. */
interface Room {
  readonly waiters: Set<Waiter>;
  readonly asking: ReturnType<typeof setInterval>;
  expiry: ReturnType<typeof setTimeout> | undefined;
  soonest: number;
}

/** Everyone who waits for a state: one subscription to the events serves them all. */
export class Waiting implements Disposable {
  readonly #registry: Registry;
  readonly #log: Logger;
  readonly #rooms = new Map<string, Room>();

  constructor(registry: Registry, hooks: PluginHooks, log: Logger) {
    this.#registry = registry;
    this.#log = log;
    // What was asked may have failed or been refused without an event, and then nothing leads to the target any more.
    registry.lanes.onEnd((id) => this.#recheck(id));
    hooks.on("instance:event", this.#notify, { consumer: "wait_for_state", buffer: 4096, lagged: this.#recheckAll });
  }

  /**
   * Resolves when the instance is in the target state, when it cannot get there by what is under way, or when `timeout`
   * milliseconds are over; an aborted `signal` counts as the timeout.
   *
   * @throws {DormouseError} `not_found` when the instance is gone, or goes while waiting
   */
  wait(id: string, target: State, { timeout, signal }: { timeout: number; signal?: AbortSignal }): Promise<WaitResult> {
    return new Promise((resolve, reject) => {
      const leave = () => this.#expire(id, waiter);
      const waiter: Waiter = {
        target,
        deadline: performance.now() + timeout,
        settle: (outcome) => {
          signal?.removeEventListener("abort", leave);
          this.#leave(id, waiter);
          if (outcome instanceof DormouseError) reject(outcome);
          else resolve(outcome);
        },
      };
      this.#enter(id, waiter);
      signal?.addEventListener("abort", leave, { once: true });
      // Only now that the waiter is in place: a change between a check and a later subscription would be missed.
      this.#check(id, waiter);
      if (signal?.aborted) leave();
    });
  }

  /** How many wait now. */
  get size(): number {
    return [...this.#rooms.values()].reduce((sum, { waiters }) => sum + waiters.size, 0);
  }

  /** Ends every wait as at its timeout. */
  [Symbol.dispose](): void {
    for (const [id, { waiters }] of [...this.#rooms]) for (const waiter of [...waiters]) this.#expire(id, waiter);
  }

  #notify = ({ instance_id, instance, to }: LifecycleEvent): void => {
    for (const waiter of [...this.#rooms.get(instance_id)?.waiters ?? []]) {
      // The event's own state first: an instance may be past it by the time the event is handled.
      if (to === waiter.target) waiter.settle({ ...shown(instance), timed_out: false });
      else this.#check(instance_id, waiter);
    }
  };

  #recheckAll = (): void => {
    for (const id of [...this.#rooms.keys()]) this.#recheck(id);
  };

  #recheck(id: string): void {
    for (const waiter of [...this.#rooms.get(id)?.waiters ?? []]) this.#check(id, waiter);
  }

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
    return !pending.some((work) => LEADS_ANYWHERE.includes(work) || OUTCOME[work as Request] === target);
  }

  #now<T>(id: string, of: (instance: Instance) => T): T | DormouseError {
    const instance = this.#registry.records.find(id);
    return instance ? of(instance) : new DormouseError("not_found", "The instance was deleted while waiting");
  }

  #expire(id: string, waiter: Waiter): void {
    waiter.settle(this.#now(id, (instance) => ({ ...shown(instance), timed_out: instance.state !== waiter.target })));
  }

  #enter(id: string, waiter: Waiter): void {
    let room = this.#rooms.get(id);
    if (!room) {
      const asking = setInterval(() => {
        look(this.#registry, id, "wait").catch((error) => {
          this.#log.debug("Looking at {id} failed: {reason}", { id, reason: messageOf(error), error });
        });
      }, ASK_EVERY);
      this.#rooms.set(id, room = { waiters: new Set(), asking, expiry: undefined, soonest: Infinity });
    }
    room.waiters.add(waiter);
    if (waiter.deadline < room.soonest) this.#arm(id, room);
  }

  // A timer for each waiter would cost more than all else when a thousand of them are answered at once.
  #arm(id: string, room: Room): void {
    clearTimeout(room.expiry);
    room.soonest = Math.min(...[...room.waiters].map(({ deadline }) => deadline));
    room.expiry = setTimeout(() => {
      for (const waiter of [...room.waiters]) if (waiter.deadline <= performance.now()) this.#expire(id, waiter);
      if (room.waiters.size > 0) this.#arm(id, room);
    }, Math.min(Math.ceil(Math.max(0, room.soonest - performance.now())), LONGEST_TIMER));
  }

  #leave(id: string, waiter: Waiter): void {
    const room = this.#rooms.get(id);
    if (!room?.waiters.delete(waiter) || room.waiters.size > 0) return;
    clearInterval(room.asking);
    clearTimeout(room.expiry);
    this.#rooms.delete(id);
  }
}

function shown({ state, state_error }: Instance): Pick<WaitResult, "state" | "state_error"> {
  return { state, state_error };
}
