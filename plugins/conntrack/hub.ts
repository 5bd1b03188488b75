import type { Logger } from "@logtape/logtape";
import type { Conntrack, Flow, FlowKind } from "../../main.ts";
import { messageOf } from "../shared/errors.ts";
import type { WatchedAddresses } from "./addresses.ts";
import type { ConntrackListener, ConntrackSource } from "./flow.ts";

type Listener = (kind: FlowKind, flow: Flow) => void;
type Follower = Parameters<Conntrack["follow"]>[0];

/** Hands the events of one source to those who watch their addresses: one look-up for each event. */
export class Hub implements Conntrack, ConntrackListener {
  readonly #watched: WatchedAddresses;
  readonly #log: Logger;
  /** Lists are replaced, never changed: an event in progress goes on over the one that it began with. */
  readonly #listeners = new Map<string, readonly Listener[]>();
  #followers: readonly Follower[] = [];
  #source: ConntrackSource | undefined;
  #error: string | null = "not connected yet";
  #resyncs = 0;

  constructor(watched: WatchedAddresses, log: Logger) {
    this.#watched = watched;
    this.#log = log;
  }

  get mode(): "netlink" | "program" {
    return this.#source?.name ?? "program";
  }

  get error(): string | null {
    return this.#error;
  }

  listenTo(source: ConntrackSource): void {
    this.#source = source;
    source.start(this);
  }

  unsupported(reason: string): void {
    this.#error = reason;
  }

  watch(address: string, listener: Listener): Disposable {
    const before = this.#listeners.get(address) ?? [];
    if (before.length === 0) this.#watched.add(address);
    this.#listeners.set(address, [...before, listener]);
    return { [Symbol.dispose]: () => this.#unwatch(address, listener) };
  }

  follow(follower: Follower): Disposable {
    this.#followers = [...this.#followers, follower];
    // Who comes late has to dump too; soon, as it does for those who were there in time.
    if (this.#error === null) {
      queueMicrotask(() => this.#error === null && this.#follows(follower) && follower.connected());
    }
    return { [Symbol.dispose]: () => void (this.#followers = this.#followers.filter((other) => other !== follower)) };
  }

  async dump(addresses?: ReadonlySet<string>): Promise<Flow[]> {
    if (!this.#source) throw new Error(`Cannot read conntrack: ${this.#error}`);
    return await this.#source.dump(addresses && { addresses });
  }

  stats(): ReturnType<Conntrack["stats"]> {
    const { events = 0, overflows = 0, malformed = 0 } = this.#source?.stats() ?? {};
    return { events, dropped: overflows, malformed, resyncs: this.#resyncs };
  }

  readonly event = (kind: FlowKind, flow: Flow): void => {
    for (const listener of this.#listeners.get(flow.destination) ?? []) listener(kind, flow);
  };

  lost(reason: string): void {
    this.#error = reason;
    this.#each((follower) => follower.lost(reason));
  }

  connected(): void {
    this.#error = null;
    this.#resyncs++;
    this.#each((follower) => follower.connected());
  }

  #follows(follower: Follower): boolean {
    return this.#followers.includes(follower);
  }

  // One that throws must not keep the others from their resync.
  #each(tell: (follower: Follower) => void): void {
    for (const follower of this.#followers) {
      try {
        tell(follower);
      } catch (error) {
        this.#log.error("Follower of conntrack failed: {reason}", { reason: messageOf(error), error });
      }
    }
  }

  #unwatch(address: string, listener: Listener): void {
    const left = this.#listeners.get(address)?.filter((other) => other !== listener) ?? [];
    if (left.length > 0) return void this.#listeners.set(address, left);
    if (this.#listeners.delete(address)) this.#watched.delete(address);
  }
}
