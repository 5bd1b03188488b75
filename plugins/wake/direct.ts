import type { Logger } from "@logtape/logtape";
import type { Conntrack, Flow, FlowKind, Hypervisor, Instance, LifecycleEvent } from "../../main.ts";
import { delay } from "../shared/async.ts";
import { messageOf } from "../shared/errors.ts";
import { isProbe } from "../shared/probe-ports.ts";
import type { Paths } from "./paths.ts";
import { policyOf } from "./policy.ts";
import type { Waker } from "./waker.ts";

const FINISHED = new Set(["NONE", "TIME_WAIT", "CLOSE"]);
/** States of a connection that was there before: that it ends asks for nothing. Where its begin was missed, so was more. */
const ENDING = new Set(["FIN_WAIT", "CLOSE_WAIT", "LAST_ACK"]);
/** States of a connection that nobody has answered yet. */
const ASKING = new Set(["SYN_SENT", "SYN_SENT2", "SYN_RECV"]);
const RETRY_MS = 2_000;
/** An event can be told this late, and on a busy machine after a sleep: then it may be about a connection from before. */
const [LATE_MS, LATE_ASLEEP_MS] = [100, 1_000];
/** Milliseconds between two looks at a connection that is about to end. */
const ENDING_MS = 10;
/** Looks at the table before a connection that was ending at each of them counts: its other side is what sleeps. */
const ENDING_CHECKS = 4;

export interface DirectOptions {
  conntrack: Conntrack;
  hypervisor: Hypervisor;
  paths: Paths;
  waker: Waker;
  /** Of the host on the bridge. */
  gateways: readonly (string | null)[];
  log: Logger;
  closing: AbortSignal;
}

interface Watched {
  readonly addresses: string;
  readonly watches: readonly Disposable[];
  /** When a connection to it was last told to begin, and when it was last asked to sleep. */
  begun: number;
  asked: number;
}

/**
 * Wakes an instance when the kernel sees a connection to its own address. Where the instance's kernel answers while it
 * sleeps, the connection is there already and only has to be noticed; else its SYN is sent again until it is awake.
 */
export class Direct implements Disposable {
  readonly #options: DirectOptions;
  readonly #watches = new Map<string, Watched>();
  readonly #retries = new Map<string, ReturnType<typeof setTimeout>>();
  /** Whose connections are being read from the table, and whether another event came since. */
  readonly #confirming = new Map<string, boolean>();
  #following: Disposable | undefined;
  #resyncing = false;
  #again = false;
  #disposed = false;

  constructor(options: DirectOptions) {
    this.#options = options;
  }

  /** Every instance is watched from its first event on, so that nothing is missed between a guard and its sleep. */
  follow({ instance, to }: LifecycleEvent): void {
    if (to === null) this.#unwatch(instance.id);
    else this.#watch(instance);
    if (to === null || to === "Running") {
      clearTimeout(this.#retries.get(instance.id));
      this.#retries.delete(instance.id);
    }
  }

  /** The instance was asked to sleep; guards may think about that for long. */
  ask({ id }: Instance): void {
    const watched = this.#watches.get(id);
    if (watched) watched.asked = Date.now();
  }

  /**
   * The instance is about to sleep. A connection that began between the request for that and this moment was told of while
   * the instance was awake: nothing else would tell of it again.
   */
  leave(instance: Instance): void {
    const watched = this.#watches.get(instance.id);
    if (watched && watched.begun > watched.asked - LATE_MS) void this.#confirm(instance);
  }

  /** As the host starts, or after events were missed: what came while nobody listened wakes now. */
  begin(instances: readonly Instance[]): void {
    const ids = new Set(instances.map(({ id }) => id));
    for (const id of [...this.#watches.keys()]) if (!ids.has(id)) this.#unwatch(id);
    for (const instance of instances) this.#watch(instance);
    this.#following ??= this.#options.conntrack.follow({ lost: () => {}, connected: () => void this.resync() });
    // While it does not listen, that it connects is yet to come, if it ever does.
    if (this.#options.conntrack.error === null) void this.resync();
  }

  /** Looks at the whole table, again and again until it can, and wakes who sleeps with a live connection. */
  async resync(): Promise<void> {
    this.#again = true;
    if (this.#resyncing) return;
    this.#resyncing = true;
    const { conntrack, log, closing } = this.#options;
    while (this.#again && !closing.aborted && !this.#disposed) {
      this.#again = false;
      try {
        this.#wakeThoseOf(await conntrack.dump());
      } catch (error) {
        if (this.#disposed) break; // with the table itself
        log.warn("Cannot read the table of connections: {reason}", { reason: messageOf(error), error });
        if (conntrack.error !== null) continue; // it tells when it is connected again
        this.#again = true;
        await delay(RETRY_MS, { signal: closing }).catch(() => {}); // closing ends the loop
      }
    }
    this.#resyncing = false;
  }

  [Symbol.dispose](): void {
    this.#disposed = true;
    this.#following?.[Symbol.dispose]();
    for (const timer of this.#retries.values()) clearTimeout(timer);
    for (const id of [...this.#watches.keys()]) this.#unwatch(id);
  }

  #watch(instance: Instance): void {
    const { id } = instance;
    const addresses = policyOf(instance).enabled ? addressesOf(instance) : [];
    const key = addresses.join(" ");
    if ((this.#watches.get(id)?.addresses ?? "") === key) return;
    this.#unwatch(id);
    if (addresses.length === 0) return;
    const seen = (kind: FlowKind, flow: Flow) => this.#seen(id, kind, flow);
    const watches = addresses.map((address) => this.#options.conntrack.watch(address, seen));
    this.#watches.set(id, { addresses: key, watches, begun: -Infinity, asked: Infinity });
  }

  #unwatch(id: string): void {
    for (const watch of this.#watches.get(id)?.watches ?? []) watch[Symbol.dispose]();
    this.#watches.delete(id);
  }

  #seen(id: string, kind: FlowKind, flow: Flow): void {
    if (kind === "destroy" || (kind === "update" && ENDING.has(flow.state))) return;
    const watched = this.#watches.get(id);
    if (kind === "new" && watched) watched.begun = Date.now();
    const instance = this.#options.hypervisor.find(id);
    if (!instance || !this.#wakes(instance, flow, kind === "new")) return;
    const late = instance.state === "Standby" ? LATE_ASLEEP_MS : LATE_MS;
    if (Date.now() - instance.phases.since < late) void this.#confirm(instance);
    else this.#wake(id);
  }

  /** Wakes it if the kernel's table has a live connection to it, that is not just about to end. */
  async #confirm(instance: Instance): Promise<void> {
    const { id } = instance;
    // A table that is being read may be without what this event is about.
    if (this.#confirming.has(id)) return void this.#confirming.set(id, true);
    const { conntrack, log, closing } = this.#options;
    try {
      for (let left = ENDING_CHECKS; left > 0 || this.#confirming.get(id);) {
        this.#confirming.set(id, false);
        const flows = await conntrack.dump(new Set(addressesOf(instance)));
        const ending = flows.filter(({ state }) => ENDING.has(state));
        this.#wakeThoseOf(--left > 0 ? flows.filter((flow) => !ending.includes(flow)) : flows);
        if (ending.length === 0) left = 0;
        else if (left > 0) await delay(ENDING_MS, { signal: closing });
      }
    } catch (error) {
      if (closing.aborted) return;
      log.warn("Cannot read the connections of {id}, it wakes to be safe: {reason}", {
        id,
        reason: messageOf(error),
        error,
      });
      this.#wake(id);
    } finally {
      this.#confirming.delete(id);
    }
  }

  #wakeThoseOf(flows: Flow[]): void {
    const { hypervisor } = this.#options;
    const owners = new Map<string, string>();
    for (const [id, { addresses }] of this.#watches) {
      for (const address of addresses.split(" ")) owners.set(address, id);
    }
    const woken = new Set<string>();
    for (const flow of flows) {
      const id = owners.get(flow.destination);
      const instance = id === undefined || woken.has(id) ? undefined : hypervisor.find(id);
      if (!instance || !this.#wakes(instance, flow, ASKING.has(flow.state))) continue;
      woken.add(instance.id);
      this.#wake(instance.id);
    }
  }

  #wakes(instance: Instance, flow: Flow, fresh: boolean): boolean {
    const { paths, waker, gateways } = this.#options;
    if (flow.protocol !== "tcp" || FINISHED.has(flow.state) || paths.awake(instance)) return false;
    if (isProbe(flow, ...gateways)) return false;
    const { state, transition } = instance;
    const stops = state === "Stopped" || state === "Shutdown" || paths.leaving(instance.id) === "stop";
    // Connections that a stop cuts end one by one: only one that begins asks for a start.
    if (stops) return fresh && transition !== "delete" && waker.startsOnDemand(instance);
    return state === "Running" || state === "Standby" || (state === "Paused" && transition !== null);
  }

  #wake(id: string): void {
    const { waker, log, conntrack, hypervisor, closing } = this.#options;
    waker.wake(id, "connection").catch((error) => {
      if (closing.aborted || this.#retries.has(id)) return;
      log.warn("{reason}", { id, reason: messageOf(error), error });
      // Nothing but a look at the table tells later whether the connection still waits.
      const again = async () => {
        this.#retries.delete(id);
        const instance = hypervisor.find(id);
        if (!instance) return;
        await conntrack.dump(new Set(addressesOf(instance))).then((flows) => this.#wakeThoseOf(flows));
      };
      const retry = () =>
        void again().catch((reason) => {
          log.warn("Cannot read the connections of {id}: {reason}", { id, reason: messageOf(reason) });
          void this.resync();
        });
      this.#retries.set(id, setTimeout(retry, Math.max(waker.backOff(id), RETRY_MS)));
    });
  }
}

function addressesOf({ network: { ip, ip6 } }: Instance): string[] {
  return [ip, ip6].filter((address) => typeof address === "string");
}
