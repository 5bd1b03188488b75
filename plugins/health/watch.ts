import { isDeepStrictEqual } from "node:util";
import type { Logger } from "@logtape/logtape";
import type { CommitContext, Extension, HealthState, Hypervisor, Instance, PluginHooks, Store } from "../../main.ts";
import { abortable } from "../shared/async.ts";
import type { Clock } from "../shared/clock.ts";
import { messageOf } from "../shared/errors.ts";
import { type Check, checkOf, isOn, type Kept } from "./policy.ts";
import type { Probe } from "./probes.ts";
import { Saver } from "./saver.ts";
import { Slots } from "./slots.ts";
import { counted, delayOf, fresh, isActive, statusOf, type Window } from "./window.ts";

/** Who writes the notes. */
export const ACTOR = "health";

/** What is kept of an instance: the status that was last told of, and its window. */
export interface Remembered {
  readonly told: HealthState;
  readonly window: Window | null;
}

export interface WatchOptions {
  hypervisor: Hypervisor;
  hooks: PluginHooks;
  store: Store;
  extension: Pick<Extension<unknown, Remembered>, "runtime" | "save">;
  policyOf(instance: Instance): Kept | undefined;
  probe: Probe;
  clock: Clock;
  log: Logger;
  /** From 0 to 1. */
  random(): number;
  maxConcurrent: number;
}

/** One instance that has a check, or had one of which something is still to be told. */
interface Entry {
  readonly id: string;
  kept: Kept | undefined;
  check: Check | undefined;
  window: Window | null;
  told: HealthState;
  cancelTimer: (() => void) | null;
  /** The probe under way; one that was replaced or let go has no say any more. */
  flight: AbortController | null;
  /** Resolves with the end of the next probe, whatever came of it. */
  next: PromiseWithResolvers<void> | null;
}

/** Probes every instance that has a check and runs, and says how it is. It never changes what state that is in. */
export class Watch {
  readonly #options: WatchOptions;
  readonly #entries = new Map<string, Entry>();
  readonly #slots: Slots<Entry>;
  readonly #saver: Saver;
  #closed = false;

  constructor(options: WatchOptions) {
    this.#options = options;
    const { store, clock, extension } = options;
    this.#slots = new Slots(options.maxConcurrent, (entry) => this.#run(entry));
    this.#saver = new Saver({
      store,
      clock,
      write: (id) => {
        const { told, window } = this.#entries.get(id)!;
        extension.save(id, { told, window });
      },
      failed: this.#failed,
    });
  }

  stats(): { running: number; waiting: number } {
    return { running: this.#slots.running, waiting: this.#slots.waiting };
  }

  stateOf(instance: Instance): HealthState {
    return statusOf(instance, isOn(this.#options.policyOf(instance)), this.windowOf(instance.id));
  }

  /** What is known of the instance; null where nothing is. */
  windowOf(id: string): Window | null {
    const entry = this.#entries.get(id);
    return entry ? entry.window : this.#options.extension.runtime(id)?.window ?? null;
  }

  /** In the transaction of every change: what ends a window ends it for good, whoever dies or is late after that. */
  commit({ before, after }: CommitContext): void {
    const window = after && this.windowOf(after.id);
    if (!before || !window) return;
    const { extension, policyOf, store } = this.#options;
    const anew = !isDeepStrictEqual(policyOf(before), policyOf(after));
    if (!anew && (window.over || !(hasEnded(before) || hasEnded(after)))) return;
    const entry = this.#entries.get(after.id);
    const told = entry?.told ?? extension.runtime(after.id)!.told;
    const ended = anew ? null : { ...window, over: true };
    extension.save(after.id, { told, window: ended });
    if (!entry) return;
    store.onRollback(() => entry.window = window);
    entry.window = ended;
  }

  /** All of them, as the host starts or after events were missed. */
  relist(): void {
    const ids = this.#options.hypervisor.list().map(({ id }) => id);
    for (const id of new Set([...this.#entries.keys(), ...ids])) this.refresh(id);
  }

  /** Brings what is done about an instance in line with what it is now; undefined where there is nothing to do. */
  refresh(id: string): Entry | undefined {
    const { hypervisor, policyOf, clock } = this.#options;
    if (this.#closed) return undefined;
    const instance = hypervisor.find(id);
    if (!instance) return void this.#drop(id);
    const kept = policyOf(instance);
    const entry = this.#entries.get(id) ?? this.#add(instance, kept);
    if (!entry) return undefined;
    if (entry.kept !== kept) [entry.kept, entry.check] = [kept, checkOf(kept)];
    const { check } = entry;
    if (!check) entry.window = null;
    if (!check || !entry.window || entry.window.over || !isActive(instance)) this.#halt(entry);
    if (check && isActive(instance)) {
      if (!entry.window || entry.window.over) entry.window = fresh(clock.now());
      this.#arm(entry);
    }
    this.#tell(entry, instance, "state");
    if (check) return entry;
    if (entry.told === "disabled") this.#drop(id);
    return undefined;
  }

  /**
   * Passes where the instance is healthy, or has no check. Else it is probed at once.
   *
   * @throws {Error} where it is not healthy then; the signal's reason
   */
  async ready({ id, name }: Instance, signal: AbortSignal): Promise<void> {
    const { hypervisor } = this.#options;
    const entry = this.refresh(id);
    if (!entry) return;
    const isHealthy = () => {
      const instance = hypervisor.find(id);
      return instance !== undefined && this.stateOf(instance) === "healthy";
    };
    if (!isHealthy()) await abortable(this.#probeNow(entry), signal);
    if (!isHealthy()) {
      throw new Error(`Instance "${name}" is not healthy: ${entry.window?.error ?? "no probe says so yet"}`);
    }
  }

  /** Lets go of the probes that are under way, and writes what is not written yet. */
  async close(): Promise<void> {
    this.#closed = true;
    for (const entry of this.#entries.values()) this.#halt(entry);
    await this.#slots.close();
    this.#saver.close();
  }

  #add(instance: Instance, kept: Kept | undefined): Entry | undefined {
    const { id, started_at } = instance;
    const remembered = this.#options.extension.runtime(id);
    if (!remembered && !isOn(kept)) return undefined;
    // Started by a host that had this plugin off.
    const missed = remembered?.window && started_at !== null && started_at > remembered.window.since;
    const window = missed ? null : remembered?.window ?? null;
    // What has never been told of: one that runs has just got its check, the others get theirs as they are made.
    const told = remembered?.told ?? (isActive(instance) ? "disabled" : "unknown");
    const idle = { cancelTimer: null, flight: null, next: null };
    const entry: Entry = { id, kept, check: checkOf(kept), window, told, ...idle };
    this.#entries.set(id, entry);
    return entry;
  }

  #drop(id: string): void {
    const entry = this.#entries.get(id);
    if (!entry) return;
    this.#halt(entry);
    this.#entries.delete(id);
    this.#saver.forget(id);
  }

  #halt(entry: Entry): void {
    entry.cancelTimer?.();
    entry.cancelTimer = null;
    this.#slots.withdraw(entry);
    entry.flight?.abort(new Error("The probe was let go"));
    this.#landed(entry);
  }

  #landed(entry: Entry): void {
    entry.flight = null;
    entry.next?.resolve();
    entry.next = null;
  }

  /** One timer, or one place in the queue, or one probe: an instance that is probed has always exactly one of them. */
  #arm(entry: Entry): void {
    const { clock, random } = this.#options;
    if (entry.cancelTimer || entry.flight || this.#slots.has(entry)) return;
    const due = () => {
      entry.cancelTimer = null;
      this.#slots.offer(entry);
    };
    entry.cancelTimer = clock.after(delayOf(entry.window!, entry.check!, clock.now(), random()), due);
  }

  #probeNow(entry: Entry): Promise<void> {
    if (!entry.cancelTimer && !entry.flight && !this.#slots.has(entry)) return Promise.resolve(); // it does not run
    entry.next ??= Promise.withResolvers();
    const { promise } = entry.next;
    if (!entry.flight) {
      entry.cancelTimer?.();
      entry.cancelTimer = null;
      this.#slots.offer(entry, { urgent: true });
    }
    return promise;
  }

  async #run(entry: Entry): Promise<void> {
    const { hypervisor, clock, probe } = this.#options;
    const { id } = entry;
    const flight = entry.flight = new AbortController();
    const { signal } = flight;
    this.refresh(id); // it may have left while it waited for its place
    if (signal.aborted) return;
    const check = entry.check!;
    const cancel = clock.after(check.timeout, () => flight.abort(new Error(`No answer within ${check.kept.timeout}`)));
    const began = performance.now();
    const error = await probe(hypervisor.find(id)!, check, signal).then(() => null, messageOf);
    const duration_ms = performance.now() - began;
    cancel();
    this.refresh(id); // as it is now, even where its event has not come yet
    if (entry.flight !== flight) return;
    entry.window = counted(entry.window!, check, error, clock.now());
    this.#landed(entry);
    this.#arm(entry);
    const type = check.kept.type;
    this.#options.hooks.publish("health:probed", { instance_id: id, type, ok: error === null, duration_ms });
    this.#saver.later(id);
    this.#tell(entry, hypervisor.find(id)!, "probe");
  }

  /** A status that is another than the last is on disk before anybody hears of it. */
  #tell(entry: Entry, instance: Instance, cause: "probe" | "state"): void {
    const { hypervisor, hooks, extension } = this.#options;
    const { id, window, told: from } = entry;
    const to = statusOf(instance, entry.check !== undefined, window);
    if (to === from) return;
    const error = to === "unhealthy" ? window!.error : null;
    try {
      const note = hypervisor.note(id, {
        type: "health:changed",
        origin: { actor: ACTOR, cause },
        summary: `Health of "${instance.name}" is ${to}${error === null ? "" : `: ${error}`}`,
        detail: { from, to, error },
      }, () => extension.save(id, entry.check && { told: to, window }));
      if (!note) return;
      entry.told = to;
      this.#saver.forget(id);
      hooks.publish("health:changed", { instance_id: id, instance, at: note.at, from, to, error });
    } catch (error) {
      this.#failed(error); // with the next probe it is told again
    }
  }

  #failed = (error: unknown): void => {
    this.#options.log.error("Saving failed: {reason}", { reason: messageOf(error), error });
  };
}

/** Whether the run that a window belongs to is at its end. */
function hasEnded({ state }: Instance): boolean {
  return state === "Created" || state === "Shutdown" || state === "Stopped" || state === "Standby";
}
