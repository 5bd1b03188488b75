import {
  DormouseError,
  type Hypervisor,
  type Instance,
  type Origin,
  type PluginHooks,
  type WakeCause,
} from "../../main.ts";
import { messageOf } from "../shared/errors.ts";
import { policyOf, timeoutOf } from "./policy.ts";

const BACK_OFF_MS = 1_000;
const LONGEST_BACK_OFF_MS = 60_000;

/** Why a connection is not served: told to the client only as a status. */
export type Refusal = "unknown" | "asleep" | "backing_off" | "full" | "failed" | "late" | "closing";

/** A connection that is not served, and why. */
export class Refused extends Error {
  override readonly name = "Refused";
  readonly refusal: Refusal;
  constructor(refusal: Refusal, message: string, options?: { cause: unknown }) {
    super(message, options);
    this.refusal = refusal;
  }

  /** What a client that speaks HTTP is told. */
  get status(): 404 | 503 | 504 {
    return this.refusal === "unknown" ? 404 : this.refusal === "late" ? 504 : 503;
  }
}

export interface WakerOptions {
  hypervisor: Hypervisor;
  hooks: PluginHooks;
  /** Whether `Stopped` instances are started too, where their policy does not say. */
  startOnDemand: boolean;
  /** What it is about to be put to while it still runs, as far as the guards know. */
  leaving(id: string): "standby" | "stop" | undefined;
}

/** Wakes instances: one attempt at a time for each, joined by all who want the same, and less and less often in vain. */
export class Waker {
  readonly counts = { wakes: 0, failed: 0 };
  readonly #options: WakerOptions;
  readonly #flights = new Map<string, Promise<void>>();
  readonly #failures = new Map<string, { count: number; until: number }>();

  constructor(options: WakerOptions) {
    this.#options = options;
  }

  /** Milliseconds until it may be woken again after a failure. */
  backOff(id: string): number {
    return Math.max(0, (this.#failures.get(id)?.until ?? 0) - performance.now());
  }

  /** It runs, or is no more: what went wrong before is forgotten. */
  reset(id: string): void {
    this.#failures.delete(id);
  }

  startsOnDemand(instance: Instance): boolean {
    return policyOf(instance).start_on_demand ?? this.#options.startOnDemand;
  }

  /**
   * Resolves once it runs. Nobody who leaves meanwhile ends it.
   *
   * @throws {Refused}
   */
  wake(id: string, cause: WakeCause): Promise<void> {
    let flight = this.#flights.get(id);
    if (!flight) {
      flight = this.#attempt(id, cause).finally(() => this.#flights.delete(id));
      this.#flights.set(id, flight);
    }
    return flight;
  }

  async #attempt(id: string, cause: WakeCause): Promise<void> {
    const instance = this.#existing(id);
    if (!policyOf(instance).enabled) throw refused("asleep", instance, "its policy says not to wake it");
    const wait = this.backOff(id);
    if (wait > 0) {
      throw refused("backing_off", instance, `the last attempt failed, the next is in ${Math.ceil(wait)} ms`);
    }
    const began = performance.now();
    try {
      if (!await this.#raise(id, { actor: "wake", cause })) return;
    } catch (error) {
      if (error instanceof Refused) throw error;
      const closing = error instanceof DormouseError && error.code === "shutting_down";
      if (closing) throw refused("closing", instance, error);
      this.#fail(id);
      this.#tell(instance, cause, performance.now() - began, messageOf(error));
      throw refused("failed", instance, error);
    }
    this.#tell(instance, cause, performance.now() - began, null);
  }

  /** Through whatever is under way, one action of the registry at a time. Resolves to whether there was any to take. */
  async #raise(id: string, origin: Origin): Promise<boolean> {
    const { hypervisor, leaving } = this.#options;
    for (let turn = 0; turn < 4; turn++) {
      const instance = this.#existing(id);
      const { state, transition } = instance;
      const going = state === "Running" ? leaving(id) : undefined;
      if (state === "Running" && going === undefined) return turn > 0;
      // A restore aborts a standby that is under way, and finds nothing to do where that was in time.
      const sleeping = state === "Standby" || going === "standby" || (state === "Paused" && transition !== null);
      try {
        if (sleeping) await hypervisor.restore(id, origin);
        else if (state === "Created" || state === "Initializing") await this.#started(instance);
        else if (going === "stop" || this.#hasEnded(instance)) {
          if (!this.startsOnDemand(instance)) throw refused("asleep", instance, `state is ${state}`);
          await hypervisor.start(id, origin);
        } else throw refused("asleep", instance, `state is ${state}`);
      } catch (error) {
        // Another action got in before this one: the next turn sees where that has led.
        if (!(error instanceof DormouseError) || !["invalid_state", "aborted"].includes(error.code)) throw error;
      }
      if (hypervisor.find(id)?.state === "Running") return true;
    }
    throw new Error(`state is ${hypervisor.find(id)?.state}`);
  }

  async #started(instance: Instance): Promise<void> {
    const timeout = timeoutOf(policyOf(instance));
    const { state } = await this.#options.hypervisor.wait(instance.id, "Running", { timeout });
    if (state === "Created" || state === "Initializing") throw new Error(`state is still ${state}`);
  }

  #hasEnded({ state, transition }: Instance): boolean {
    return state === "Stopped" || (state === "Shutdown" && transition === "stop");
  }

  #existing(id: string): Instance {
    const instance = this.#options.hypervisor.find(id);
    if (!instance) throw new Refused("unknown", `No instance "${id}"`);
    return instance;
  }

  #fail(id: string): void {
    const count = (this.#failures.get(id)?.count ?? 0) + 1;
    const pause = Math.min(BACK_OFF_MS * 2 ** (count - 1), LONGEST_BACK_OFF_MS);
    this.#failures.set(id, { count, until: performance.now() + pause });
  }

  #tell({ id, name }: Instance, cause: WakeCause, latency_ms: number, error: string | null): void {
    if (error === null) this.counts.wakes++;
    else this.counts.failed++;
    this.#options.hooks.publish("wake:done", { instance_id: id, name, cause, error, latency_ms });
  }
}

function refused(refusal: Refusal, { name }: Instance, why: unknown): Refused {
  const options = typeof why === "string" ? undefined : { cause: why };
  return new Refused(refusal, `Cannot wake instance "${name}": ${messageOf(why)}`, options);
}
