import type { Logger } from "@logtape/logtape";
import type {
  CommitContext,
  Extension,
  GuardContext,
  Hypervisor,
  Instance,
  LifecycleEvent,
  Store,
} from "../../main.ts";
import { DormouseError } from "../../main.ts";
import { type Clock, endOf, settled } from "../shared/clock.ts";
import { messageOf } from "../shared/errors.ts";
import { Acquires } from "./acquires.ts";
import { ACTOR, type Entry, isNeeded, refuseNeeded, type Remembered, remembered, rewinding } from "./entry.ts";
import type { Acquired } from "./flight.ts";
import { type Lease, Leases } from "./leases.ts";
import type { Notes } from "./notes.ts";
import { type LazyPolicy, type Terms, termsOf } from "./policy.ts";
import type { Raising } from "./raise.ts";
import { Stops } from "./stops.ts";

export interface Parts {
  hypervisor: Hypervisor;
  hooks: Raising["hooks"];
  store: Store;
  extension: Extension<LazyPolicy, Remembered>;
  notes: Notes;
  clock: Clock;
  log: Logger;
}
export interface Limits {
  /** Leases that one instance may have. */
  maxLeases: number;
  /** Stops at the same time. */
  maxConcurrent: number;
  /** Milliseconds until a stop that failed is tried again, at first. */
  retryBackoff: number;
}

/** Knows of every lazy instance who needs it, and has those stopped that nobody does. */
export class Keeper {
  readonly #parts: Parts;
  readonly #entries = new Map<string, Entry>();
  readonly #acquires: Acquires;
  readonly #stops: Stops;
  readonly #retryBackoff: number;
  #closed = false;

  constructor(parts: Parts, limits: Limits) {
    this.#parts = parts;
    this.#retryBackoff = limits.retryBackoff;
    const own = {
      save: (entry: Entry) => this.#save(entry),
      settled: (entry: Entry) => this.look(entry),
      isDue: (entry: Entry) => (this.#dueAt(entry) ?? Infinity) <= parts.clock.now(),
      sayStopped: (entry: Entry) => this.#sayStopped(entry),
    };
    this.#acquires = new Acquires({ ...parts, ...own, maxLeases: limits.maxLeases });
    this.#stops = new Stops({ ...parts, ...own, ...limits });
  }

  get entries(): Iterable<Entry> {
    return this.#entries.values();
  }

  find(id: string): Entry | undefined {
    return this.#entries.get(id);
  }

  /** @throws {DormouseError} `not_lazy` */
  lazy(instance: Instance): Entry {
    const entry = this.#observe(instance);
    if (entry) return entry;
    const message = `Cannot lease instance "${instance.name}": its field "lazy" does not say {"enabled": true}`;
    throw new DormouseError("not_lazy", message);
  }

  /** A lease of `ttl` milliseconds, once the instance is ready; none for who has left by then (`signal`). */
  async acquire(entry: Entry, ttl: number, signal: AbortSignal): Promise<Acquired> {
    this.#expire(entry);
    const acquired = await this.#acquires.acquire(entry, ttl, signal);
    if (!signal.aborted) return acquired;
    this.#end(entry, acquired.lease.id);
    throw signal.reason;
  }

  /** For `ttl` milliseconds from now, or its own time. @throws {DormouseError} `lease_not_found` */
  renew(entry: Entry, id: string, ttl: number | undefined): Lease {
    const lease = entry.leases.renew(id, ttl, this.#parts.clock.now());
    if (!lease) throw unknownLease(id);
    this.#save(entry);
    this.#arm(entry);
    return lease;
  }

  /** @throws {DormouseError} `lease_not_found` */
  release(entry: Entry, id: string): void {
    this.#expire(entry);
    if (!this.#end(entry, id)) throw unknownLease(id);
  }

  /** Takes in all that is there; again for events that were missed. */
  relist(): void {
    const instances = this.#parts.hypervisor.list();
    const there = new Set(instances.map(({ id }) => id));
    for (const entry of [...this.#entries.values()]) if (!there.has(entry.id)) this.#drop(entry);
    for (const instance of instances) {
      const entry = this.#observe(instance);
      if (!entry) continue;
      // The host died between the stop and the note of it.
      if (entry.unsaid !== null && !entry.stopping) this.#sayStopped(entry);
      this.look(entry);
    }
  }

  /** In the transaction of a change: what it means for those who need the instance is on disk with it. */
  commit({ event, before, after }: CommitContext): void {
    if (!before || !after) return;
    const { extension, clock } = this.#parts;
    const [was, terms] = [before, after].map((instance) => termsOf(extension.policy(instance)));
    const known = this.#entries.get(after.id);
    const rewind = known && rewinding(known);
    this.#parts.store.onRollback(() => {
      if (!known) return void this.#entries.delete(after.id);
      rewind!();
      this.#entries.set(after.id, known);
      this.#arm(known);
    });
    if (!terms) {
      if (known) this.#drop(known);
      const kept = extension.runtime(after.id);
      if (was && kept) extension.save(after.id, { ...kept, leases: [] });
      return;
    }
    const entry = known ?? this.#add(after, terms);
    const { action, actor, from, to } = event;
    const ours = actor === ACTOR;
    let changed = false;
    if (!was) entry.leases.clear();
    if ((to === "Running" && from !== "Running") || !was) {
      [entry.freeSince, entry.failed, entry.retry, changed] = [clock.now(), false, null, true];
    }
    if (ours && (action === "start" || action === "restore") && entry.flight) {
      entry.flight.raised = entry.flight.starts = true;
    }
    if (action === "stop" || action === "standby") {
      if (ours) [entry.unsaid, changed] = [Math.max(0, clock.now() - entry.freeSince) / 1000, true];
      // Somebody has decided against who holds them, who learns of it by the next renewal. A restart is no such decision.
      if (entry.leases.size > 0 && actor !== "restart") changed = (entry.leases.clear(), true);
    }
    if (changed) this.#save(entry);
  }

  /** After a change. */
  take(event: LifecycleEvent): void {
    const instance = this.#parts.hypervisor.find(event.instance_id);
    const entry = instance ? this.#observe(instance) : this.#entries.get(event.instance_id);
    if (!entry) return;
    if (instance) this.look(entry);
    else this.#drop(entry);
  }

  /** Under the lock, before a stop or a standby. @throws {Veto} where somebody needs the instance */
  guard(context: GuardContext, action: "stop" | "standby"): void {
    const entry = this.#entries.get(context.instance.id);
    if (entry) refuseNeeded(entry, context, action, this.#parts.clock.now());
  }

  /** A timer rang, or something has changed: stops the instance if its time has come, else waits for that. */
  look(entry: Entry): void {
    if (entry.gone || this.#closed) return;
    this.#expire(entry);
    const due = this.#dueAt(entry);
    if (due !== null && due <= this.#parts.clock.now()) this.#stops.offer(entry);
    else this.#arm(entry);
  }

  /** Nothing is begun from here on; resolves once what was has ended. */
  async close(): Promise<void> {
    this.#closed = true;
    for (const entry of this.#entries.values()) entry.alarm?.cancel();
    await Promise.all([this.#acquires.close(), this.#stops.close()]);
  }

  #observe(instance: Instance): Entry | undefined {
    const terms = termsOf(this.#parts.extension.policy(instance));
    const entry = this.#entries.get(instance.id);
    if (!terms) return entry && void this.#drop(entry);
    if (!entry) return this.#add(instance, terms);
    entry.terms = terms;
    return entry;
  }

  #add({ id, phases }: Instance, terms: Terms): Entry {
    const kept = this.#parts.extension.runtime(id);
    const now = this.#parts.clock.now();
    const entry: Entry = {
      id,
      terms,
      leases: new Leases(kept?.leases),
      // It may have been stopped and started while this plugin was off.
      freeSince: kept ? Math.max(kept.free_since, Math.min(phases.since, now)) : now,
      granted: kept?.granted ?? 0,
      failed: kept?.failed ?? false,
      unsaid: kept?.unsaid ?? null,
      flight: undefined,
      stopping: undefined,
      retry: null,
      alarm: null,
      gone: false,
    };
    this.#entries.set(id, entry);
    return entry;
  }

  /** The time at which nobody has needed it for long enough; null while it is needed, or there is nothing to stop. */
  #dueAt(entry: Entry): number | null {
    const instance = this.#parts.hypervisor.find(entry.id);
    if (entry.gone || entry.stopping || instance?.state !== "Running" || instance.transition !== null) return null;
    const now = this.#parts.clock.now();
    if (isNeeded(entry, now)) return null;
    // The clock may have stepped back.
    const idle = settled({ from: entry.freeSince, ms: entry.terms.idleStop }, now);
    entry.retry = settled(entry.retry, now);
    entry.freeSince = idle.from;
    return Math.max(endOf(idle), endOf(entry.retry));
  }

  /** The last lease that ended began the idle window, also where nobody was there to see it. */
  #expire(entry: Entry): void {
    const now = this.#parts.clock.now();
    const ended = entry.leases.expire(now);
    if (ended === null) return;
    if (!isNeeded(entry, now)) entry.freeSince = Math.max(entry.freeSince, ended);
    this.#save(entry);
  }

  /** Whether there was such a lease. */
  #end(entry: Entry, id: string): boolean {
    const now = this.#parts.clock.now();
    if (!entry.leases.release(id, now)) return false;
    if (!isNeeded(entry, now)) entry.freeSince = now;
    this.#save(entry);
    this.look(entry);
    return true;
  }

  #arm(entry: Entry): void {
    if (entry.gone || this.#closed) return;
    const { clock } = this.#parts;
    const now = clock.now();
    const at = entry.leases.held(now) ? entry.leases.nextEnd(now) : this.#dueAt(entry);
    if (at === entry.alarm?.at) return;
    entry.alarm?.cancel();
    entry.alarm = at === null ? null : { at, cancel: clock.after(at - now, () => this.#ring(entry)) };
  }

  #ring(entry: Entry): void {
    entry.alarm = null;
    try {
      this.look(entry);
    } catch (error) {
      // Such as a full disk. Nobody else would come back to it.
      const { clock, log } = this.#parts;
      log.error("Looking at lazy instance {id} failed: {reason}", { id: entry.id, reason: messageOf(error), error });
      const at = clock.now() + this.#retryBackoff;
      entry.alarm ??= { at, cancel: clock.after(this.#retryBackoff, () => this.#ring(entry)) };
    }
  }

  #sayStopped(entry: Entry): void {
    const seconds = entry.unsaid;
    if (seconds === null) return;
    entry.unsaid = null;
    try {
      this.#parts.notes.stopped(entry.id, seconds, () => this.#save(entry));
    } catch (error) {
      entry.unsaid = seconds; // it is said at the next occasion, at the latest by the next host
      throw error;
    }
  }

  #save(entry: Entry): void {
    if (!entry.gone) this.#parts.extension.save(entry.id, remembered(entry));
  }

  #drop(entry: Entry): void {
    entry.gone = true;
    entry.alarm?.cancel();
    this.#entries.delete(entry.id);
  }
}

function unknownLease(id: string): DormouseError {
  return new DormouseError(
    "lease_not_found",
    `No lease "${id.slice(0, 100)}": it was released, it has ended, or the instance was stopped`,
  );
}
