import type { Socket } from "node:net";
import type { Hypervisor, WakeCause } from "../../main.ts";
import { abortable } from "../shared/async.ts";
import { type Bounds, Holding } from "./holding.ts";
import type { Paths } from "./paths.ts";
import { policyOf, timeoutOf } from "./policy.ts";
import type { Readiness } from "./readiness.ts";
import { dial } from "./splice.ts";
import { Refused, type Waker } from "./waker.ts";

/** How often a connection follows an instance that falls asleep again before it was reached. */
const ROUNDS = 5;

export interface GateOptions {
  hypervisor: Hypervisor;
  paths: Paths;
  readiness: Readiness;
  waker: Waker;
  bounds: Bounds;
  addressOf: ConstructorParameters<typeof Paths>[0]["addressOf"];
  /** Aborts when the host closes. */
  closing: AbortSignal;
}

/** Where a connection waits until its instance is there to take it. */
export class Gate {
  readonly counts = { connections: 0, refused: 0 };
  readonly holding: Holding;
  readonly #options: GateOptions;

  constructor(options: GateOptions) {
    this.#options = options;
    this.holding = new Holding(options.bounds);
  }

  /**
   * A connection to a port of an instance, which is woken for it where need be. `left` aborts when the client has gone;
   * the wake goes on all the same.
   *
   * @throws {Refused} `late` past the policy's timeout
   * @throws {Error} where the instance is awake and does not take it
   */
  async reach(id: string, port: number, cause: WakeCause, left: AbortSignal): Promise<Socket> {
    this.counts.connections++;
    const instance = this.#options.hypervisor.find(id);
    const leave = this.holding.enter(id);
    if (!instance || !leave) {
      this.counts.refused++;
      throw instance ? new Refused("full", "Too many connections wait") : new Refused("unknown", `No instance "${id}"`);
    }
    const { closing } = this.#options;
    const late = new AbortController();
    const expire = () => late.abort(new Refused("late", `Instance "${instance.name}" did not take it in time`));
    const timer = setTimeout(expire, Math.min(timeoutOf(policyOf(instance)), 2 ** 31 - 1));
    const signal = AbortSignal.any([left, late.signal, closing]);
    try {
      return await this.#pass(id, port, cause, signal);
    } catch (error) {
      this.counts.refused++;
      if (closing.aborted) throw new Refused("closing", "The host is closing", { cause: error });
      throw late.signal.aborted ? late.signal.reason : error;
    } finally {
      clearTimeout(timer);
      leave();
    }
  }

  async #pass(id: string, port: number, cause: WakeCause, signal: AbortSignal): Promise<Socket> {
    const { hypervisor, paths, readiness, waker, addressOf } = this.#options;
    for (let round = 1;; round++) {
      const before = hypervisor.find(id);
      if (!before) throw new Refused("unknown", `No instance "${id}"`);
      // A restore gives it none either.
      if (before.state === "Standby" && addressOf(before) === null) {
        throw new Refused("asleep", `Instance "${before.name}" has no address`);
      }
      if (!paths.awake(before)) await abortable(waker.wake(id, cause), signal);
      const instance = hypervisor.find(id) ?? before;
      const host = addressOf(instance);
      const probe = paths.probeOf(instance, port);
      if (host === null || !probe) throw new Refused("asleep", `Instance "${instance.name}" has no address`);
      if (!await readiness.wait(id, probe, signal)) {
        // It sleeps again, or its port never opened.
        if (round < ROUNDS && hypervisor.find(id)?.state !== "Running") continue;
        throw new Refused("late", `Instance "${instance.name}" does not answer on port ${port}`);
      }
      try {
        return await dial(host, port, signal);
      } catch (error) {
        signal.throwIfAborted();
        const now = hypervisor.find(id);
        if (round >= ROUNDS || !now || paths.awake(now)) throw error;
      }
    }
  }
}
