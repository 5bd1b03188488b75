import type { Flow, FlowKind, Instance, LifecycleEvent, StandbyStats } from "../../main.ts";
import { messageOf } from "../shared/errors.ts";
import { ACTOR, Attempts } from "./attempts.ts";
import { Dumps, type Snapshot } from "./dumps.ts";
import { addressesOf, type Entry, ineligible } from "./entry.ts";
import { filterOf } from "./filter.ts";
import type { ControllerOptions, Parts } from "./parts.ts";
import { type AutoStandby, idleTimeoutOf } from "./policy.ts";
import { Saver } from "./saver.ts";
import { Sight } from "./sight.ts";
import { type Change, type Remembered, Tracker } from "./tracker.ts";

/** Watches every instance with a policy, and has those put to sleep that nobody uses. */
export class Controller {
  readonly #parts: Parts;
  readonly #options: ControllerOptions;
  readonly #entries = new Map<string, Entry>();
  /** Those with live flows. */
  readonly #active = new Set<Entry>();
  readonly #saver: Saver<Remembered>;
  readonly dumps: Dumps;
  readonly attempts: Attempts;
  readonly sight: Sight;
  #cancelReconcile: (() => void) | undefined;
  #cancelFullSync: (() => void) | undefined;
  #closed = false;

  constructor(parts: Parts, options: ControllerOptions) {
    this.#parts = parts;
    this.#options = options;
    const { clock, log, hypervisor, conntrack, store, extension, decide } = parts;
    this.dumps = new Dumps(conntrack, this.#merge);
    this.sight = new Sight(parts, this.dumps, {
      lost: () => this.attempts.overtakeQueued("observer_error"),
      regained: this.#regained,
    });
    const save = (id: string, value: Remembered) => extension.save(id, value);
    const failed = (error: unknown) => log.error("Saving failed: {reason}", { reason: messageOf(error), error });
    this.#saver = new Saver({ store, clock, save, failed });
    this.attempts = new Attempts({
      hypervisor,
      clock,
      log,
      decide,
      dumps: this.dumps,
      maxConcurrent: options.maxConcurrent,
      blind: () => this.sight.blind,
      settled: (entry) => this.#look(entry),
    });
  }

  find(id: string): Entry | undefined {
    return this.#entries.get(id);
  }

  stats(): StandbyStats {
    let [active, idle, flows] = [0, 0, 0];
    for (const { policy, tracker } of this.#entries.values()) {
      if (!policy.enabled || !tracker.isAwake) continue;
      if (tracker.connections > 0) active++;
      else idle++;
      flows += tracker.connections;
    }
    return { active, idle, flows, ...this.attempts.sizes };
  }

  /** Takes in all that is there, and begins to look. */
  async start(): Promise<void> {
    this.relist();
    this.#armFullSync();
    await this.sight.open();
  }

  /** For events that were missed. */
  relist(): void {
    const instances = this.#parts.hypervisor.list();
    const there = new Set(instances.map(({ id }) => id));
    for (const entry of [...this.#entries.values()]) if (!there.has(entry.id)) this.#drop(entry);
    for (const instance of instances) this.#observe(instance, null);
  }

  take(event: LifecycleEvent): void {
    if (event.to !== null) return this.#observe(event.instance, event);
    const entry = this.#entries.get(event.instance_id);
    if (entry) this.#drop(entry);
  }

  hold(entry: Entry, ms: number): void {
    entry.tracker.hold(ms, this.#parts.clock.now());
    this.attempts.overtaken(entry);
    this.#saver.now(entry.id, entry.tracker.remember());
    this.#arm(entry);
  }

  release(entry: Entry): void {
    entry.tracker.release();
    this.#saver.now(entry.id, entry.tracker.remember());
    this.#arm(entry);
  }

  async close(): Promise<void> {
    this.#closed = true;
    this.#cancelReconcile?.();
    this.#cancelFullSync?.();
    this.sight.close();
    await this.attempts.close();
    await this.dumps.idle();
    for (const entry of this.#active) this.#saver.later(entry.id, () => entry.tracker.remember());
    for (const entry of this.#entries.values()) {
      entry.alarm?.cancel();
      for (const watch of entry.watches) watch[Symbol.dispose]();
    }
    this.#saver.close();
  }

  /** The instance as it is now; `event` is what made it so, null where that is not known. */
  #observe(instance: Instance, event: LifecycleEvent | null): void {
    const policy = this.#parts.extension.policy(instance);
    let entry = this.#entries.get(instance.id);
    if (entry && instance.revision <= entry.instance.revision) return;
    if (!policy) return entry && this.#drop(entry);
    const known = entry?.policy;
    entry ??= this.#add(instance, policy);
    entry.instance = instance;
    if (JSON.stringify(known) !== JSON.stringify(policy) || !this.#watched(entry)) {
      this.#configure(entry, policy, event);
    }
    this.#follow(entry, event);
    this.attempts.overtaken(entry);
    this.#arm(entry);
  }

  #add(instance: Instance, policy: AutoStandby): Entry {
    const { id } = instance;
    const remembered = this.#parts.extension.runtime(id);
    const tracker = new Tracker(this.#options, this.dumps.epoch, remembered);
    const fresh = { alarm: null, slept: false, race: undefined, gone: false, addresses: [], watches: [] };
    const entry: Entry = { id, instance, policy, tracker, ...fresh };
    this.#entries.set(id, entry);
    return entry;
  }

  #watched({ instance, addresses, policy }: Entry): boolean {
    return !policy.enabled || addressesOf(instance).join() === addresses.join();
  }

  #configure(entry: Entry, policy: AutoStandby, event: LifecycleEvent | null): void {
    const { conntrack, clock, log } = this.#parts;
    const { tracker, id } = entry;
    entry.policy = policy;
    for (const watch of entry.watches) watch[Symbol.dispose]();
    tracker.configure(idleTimeoutOf(policy), filterOf(policy, this.#options.filter), clock.now());
    this.#active.delete(entry);
    entry.addresses = policy.enabled ? addressesOf(entry.instance) : [];
    const listener = (kind: FlowKind, flow: Flow) => this.#event(entry, kind, flow);
    entry.watches = entry.addresses.map((address) => conntrack.watch(address, listener));
    // Who is connected already. At the start one dump serves all; and before any sleep there is another.
    if (entry.addresses.length === 0 || this.sight.blind) return;
    this.dumps.take().then(() => {
      // An address that was somebody else's: what still stands in the table for it was theirs.
      if (event?.action === "create" && !tracker.isAwake) tracker.forsake();
    }, (error) => log.warn("Cannot see who uses instance {id}: {reason}", { id, reason: messageOf(error), error }));
  }

  #follow(entry: Entry, event: LifecycleEvent | null): void {
    const { clock, hypervisor } = this.#parts;
    const { instance, tracker } = entry;
    const now = clock.now();
    const driver = hypervisor.drivers().find(({ name }) => name === instance.driver);
    tracker.eligible = ineligible(instance, driver?.features.has("standby") ?? false) === null;
    const { state, transition } = instance;
    if (state === "Running") {
      if (tracker.isAwake) return;
      const awake_for = tracker.woke(now, { cycle: entry.slept });
      entry.slept = false;
      if (awake_for > 0) this.#flapping(entry, awake_for, now);
      return this.#saver.later(entry.id, () => tracker.remember());
    }
    // On its way to sleep it may yet come back as if nothing had been, and what cannot be told changes nothing.
    if (state === "Unknown" || (state === "Paused" && transition === "standby")) return;
    if (tracker.attempt?.phase !== "committed") tracker.overtake("state");
    if (state === "Standby" && event) entry.slept = event.actor === ACTOR;
    const wasAwake = tracker.isAwake;
    tracker.left(state === "Standby" ? "slept" : state === "Stopped" ? "stopped" : "paused");
    if (tracker.connections === 0) this.#active.delete(entry);
    if (wasAwake) this.#saver.now(entry.id, tracker.remember());
  }

  #flapping(entry: Entry, awake_for: number, at: number): void {
    const { id: instance_id, tracker: { cycles }, instance: { name: instance_name } } = entry;
    this.#parts.flapping({ instance_id, instance_name, at, cycles, awake_for });
  }

  /** The hot path: every event of a flow to a watched address. */
  #event(entry: Entry, kind: FlowKind, flow: Flow): void {
    const change = entry.tracker.event(kind, flow, this.#parts.clock.now());
    if (change === null) return;
    this.#react(entry, change);
  }

  #merge = ({ epoch, flows }: Snapshot): void => {
    const now = this.#parts.clock.now();
    for (const entry of this.#entries.values()) {
      const [first, ...more] = entry.addresses.map((address) => flows.get(address)).filter((list) =>
        list !== undefined
      );
      this.#react(entry, entry.tracker.sync(more.length > 0 ? [first, ...more].flat() : first, epoch, now));
    }
  };

  #react(entry: Entry, change: Change): void {
    if (change === null) return;
    this.#saver.later(entry.id, () => entry.tracker.remember());
    if (change === "idle") {
      this.#active.delete(entry);
      return this.#arm(entry);
    }
    this.#active.add(entry);
    this.attempts.overtaken(entry);
    this.#armReconcile();
  }

  #regained = (blindFor: number): void => {
    const now = this.#parts.clock.now();
    for (const entry of this.#entries.values()) {
      entry.tracker.excuse(blindFor, now);
      this.#arm(entry);
    }
  };

  /** Sets the timer, unless it rings early enough already: most idle times end before they are over. */
  #arm(entry: Entry): void {
    const { clock } = this.#parts;
    const now = clock.now();
    const deadline = entry.tracker.deadline(now);
    if (deadline === null || entry.gone || this.#closed || entry.tracker.attempt !== null) return;
    if (entry.alarm && entry.alarm.at <= deadline) return;
    entry.alarm?.cancel();
    const ring = () => {
      entry.alarm = null;
      this.#look(entry);
    };
    entry.alarm = { at: deadline, cancel: clock.after(deadline - now, ring) };
  }

  /** A timer rang or an attempt is over. Whether the deadline has passed is asked anew. */
  #look(entry: Entry): void {
    if (entry.gone || this.#closed) return;
    if (entry.tracker.verdict(this.#parts.clock.now(), this.sight.blind) === "ready_for_standby") {
      this.attempts.offer(entry);
    } else if (!this.sight.blind) this.#arm(entry);
  }

  #drop(entry: Entry): void {
    entry.gone = true;
    entry.tracker.overtake("state");
    this.attempts.overtaken(entry);
    entry.alarm?.cancel();
    for (const watch of entry.watches) watch[Symbol.dispose]();
    this.#active.delete(entry);
    this.#entries.delete(entry.id);
    this.#saver.forget(entry.id);
  }

  #armReconcile(): void {
    const { clock } = this.#parts;
    if (this.#closed || this.#active.size === 0) return;
    this.#cancelReconcile ??= clock.after(this.#options.reconcileInterval, () => void this.#reconcile());
  }

  /** For ends that nothing has told of, and for half-open flows that have grown old. One dump serves all. */
  async #reconcile(): Promise<void> {
    const now = this.#parts.clock.now();
    for (const entry of [...this.#active]) this.#react(entry, entry.tracker.expire(now));
    if (this.#active.size > 0 && !this.sight.blind) await this.sight.refresh("reconcile");
    this.#cancelReconcile = undefined;
    this.#armReconcile();
  }

  #armFullSync(): void {
    this.#cancelFullSync = this.#parts.clock.after(this.#options.fullSync, async () => {
      this.relist();
      if (!this.sight.blind) await this.sight.refresh("full sync");
      if (!this.#closed) this.#armFullSync();
    });
  }
}
