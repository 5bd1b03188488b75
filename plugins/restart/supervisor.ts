import type { Logger } from "@logtape/logtape";
import { DormouseError, Veto } from "../../main.ts";
import type { CommitContext, Extension, Fulfilled, GuardContext, Health, Hypervisor, Instance } from "../../main.ts";
import type { LifecycleEvent, Origin } from "../../main.ts";
import type { Clock } from "../shared/clock.ts";
import { messageOf } from "../shared/errors.ts";
import { ACTOR, BLANK, failed, follow, isBlank, type Ledger, ranFor, resumed, scheduled, stopped } from "./ledger.ts";
import { type Terms, UNHEALTHY, withdrawn } from "./ledger.ts";
import { done, notDone, originOf, untold } from "./notes.ts";
import type { Places } from "./places.ts";
import { firstDelay, longestDelay, type RestartPolicy, stableAfter } from "./policy.ts";

export interface Parts {
  hypervisor: Hypervisor;
  extension: Extension<RestartPolicy, Ledger>;
  /** Undefined where there is no plugin `health`. */
  health: Health | undefined;
  places: Places;
  clock: Clock;
  random: () => number;
  log: Logger;
}

/** An attempt that waits for its place or for its turn in the instance's lane, or is under way. */
interface Flight {
  /** The `next_attempt_at` that it is for: another one is not what was decided. */
  readonly due: number;
  /** Attempts before this one. */
  readonly attempts: number;
  /** The registry has begun with it. */
  begun: boolean;
  /** One of our own guards was against it. */
  overtaken: boolean;
}

/** Makes the attempts that the ledgers say, when they say. What is decided is decided in the ledgers' transactions. */
export class Supervisor {
  readonly #parts: Parts;
  readonly #alarms = new Map<string, () => void>();
  readonly #flights = new Map<string, Flight>();
  readonly #running = new Set<Promise<void>>();
  /** Not before the registry knows what runs. */
  #open = false;

  constructor(parts: Parts) {
    this.#parts = parts;
    const { hypervisor, extension, clock } = parts;
    for (const instance of hypervisor.list()) {
      const ledger = extension.runtime(instance.id);
      if (ledger) this.#save(instance, resumed(ledger, instance, clock.now()));
    }
  }

  /** Takes up what is due. */
  begin(): void {
    this.#open = true;
    this.relist();
  }

  /** For events that were missed. */
  relist(): void {
    for (const { id } of this.#parts.hypervisor.list()) this.look(id);
  }

  async close(): Promise<void> {
    this.#open = false;
    for (const cancel of this.#alarms.values()) cancel();
    this.#alarms.clear();
    await Promise.all(this.#running);
  }

  /** In the transaction of the change: whoever kills the host right after it has lost nothing. */
  commit(context: CommitContext): void {
    const { before, after, event } = context;
    if (!before || !after) return;
    const ledger = this.#ledger(after.id);
    const next = follow(ledger, context, this.#terms(after));
    const flight = this.#flights.get(after.id);
    if (flight && event.actor === ACTOR && after.transition !== before.transition) flight.begun ||= !!after.transition;
    if (next !== ledger || next.run !== after.started_at) this.#save(after, next);
  }

  /** For a request that makes no change: it is stopped already, or runs. */
  fulfilled({ action, instance, origin }: Fulfilled): void {
    if (origin.actor === ACTOR) return;
    const ledger = this.#ledger(instance.id);
    if (action === "stop") this.#save(instance, stopped(ledger));
    if (action === "start" && ledger.blocked_reason !== null) this.#save(instance, BLANK);
    this.look(instance.id);
  }

  /** Under the lock, right before the start: whether it is still what is wanted. */
  admitStart({ instance, origin }: GuardContext): void {
    if (origin.actor === ACTOR) this.#admit(instance, instance.state === "Stopped");
  }

  /** The same before a running instance is stopped to be started again. */
  admitStop({ instance, origin }: GuardContext): void {
    if (origin.actor === ACTOR) this.#admit(instance, this.#isUnwell(instance));
  }

  follow({ instance_id, action }: LifecycleEvent): void {
    // What health says right after any other change may yet be about what was before it.
    if (action === "update") this.look(instance_id);
    else this.#refresh(instance_id);
  }

  /** Health may have changed. */
  look(id: string): void {
    const instance = this.#parts.hypervisor.find(id);
    if (instance && this.#open) this.#judge(instance);
    this.#refresh(id);
  }

  stats(): { waiting: number; blocked: Record<string, number> } {
    const { hypervisor, extension } = this.#parts;
    const blocked: Record<string, number> = { manual_stop: 0, max_attempts_exceeded: 0 };
    let waiting = 0;
    for (const instance of hypervisor.list()) {
      const { next_attempt_at, blocked_reason } = this.#ledger(instance.id);
      if (!extension.policy(instance)) continue;
      if (next_attempt_at !== null) waiting++;
      if (blocked_reason !== null) blocked[blocked_reason]++;
    }
    return { waiting, blocked };
  }

  #ledger(id: string): Ledger {
    return this.#parts.extension.runtime(id) ?? BLANK;
  }

  #terms(instance: Instance): Terms {
    const { extension, clock, random } = this.#parts;
    return { policy: extension.policy(instance), now: clock.now(), random };
  }

  #save({ id, started_at }: Instance, ledger: Ledger): void {
    const { extension } = this.#parts;
    const next = isBlank(ledger) ? undefined : { ...ledger, run: started_at };
    if (JSON.stringify(next) !== JSON.stringify(extension.runtime(id))) extension.save(id, next);
  }

  #admit(instance: Instance, possible: boolean): void {
    const flight = this.#flights.get(instance.id);
    const { next_attempt_at: next, replacing, blocked_reason } = this.#ledger(instance.id);
    const wanted = blocked_reason === null && next !== null && (replacing || next === flight?.due);
    if (wanted && possible) return;
    if (flight) flight.overtaken = true;
    throw new Veto("overtaken", "it is not to be restarted any more");
  }

  #isUnwell(instance: Instance): boolean {
    const { extension, health } = this.#parts;
    if (!extension.policy(instance)?.on_unhealthy || instance.state !== "Running") return false;
    return health?.stateOf(instance) === "unhealthy";
  }

  /** Whether it runs and is unwell: that shows in no change of the instance, so it is decided here. */
  #judge(instance: Instance): void {
    const ledger = this.#ledger(instance.id);
    if (this.#flights.has(instance.id) || ledger.blocked_reason !== null) return;
    const unwell = this.#isUnwell(instance) && instance.transition === null;
    const pending = ledger.next_attempt_at !== null;
    if (unwell && !pending) this.#tell(instance, scheduled(ledger, UNHEALTHY, this.#terms(instance)));
    if (!unwell && pending && instance.state === "Running") this.#save(instance, withdrawn(ledger));
  }

  /** Sets the alarm for what comes next, not before `rest` milliseconds, and tells what is untold. */
  #refresh(id: string, rest = 0): void {
    const instance = this.#parts.hypervisor.find(id);
    this.#alarms.get(id)?.();
    this.#alarms.delete(id);
    if (!instance || !this.#open || this.#flights.has(id)) return;
    this.#arm(instance, rest);
    const ledger = this.#ledger(id);
    if (ledger.untold !== null) this.#tell(instance, ledger);
  }

  #arm(instance: Instance, rest: number): void {
    const { clock, extension } = this.#parts;
    const { id } = instance;
    const [policy, ledger, now] = [extension.policy(instance), this.#ledger(id), clock.now()];
    const { next_attempt_at: due, attempts, ran } = ledger;
    if (!policy) return;
    if (due !== null) {
      // One that lies further away than any delay is of before the clock stepped back.
      const wait = Math.max(0, Math.min(due - now, longestDelay(policy)), rest);
      const isEarly = (passed: number) => passed >= 0 && passed < wait;
      this.#ring(id, wait, () => isEarly(clock.now() - now) ? this.#refresh(id) : this.#launch(id, due));
    } else if (attempts > 0 && ran.since !== null) {
      if (ran.since > now) return this.#settle(instance, { ...ledger, ran: { ...ran, since: now } });
      const left = stableAfter(policy) - ranFor(ledger, now);
      if (left > 0) this.#ring(id, Math.max(left, rest), () => this.#refresh(id));
      else if (!this.#isUnwell(instance)) this.#save(instance, BLANK);
    }
  }

  /** With a running time that a clock which stepped back cannot make endless. */
  #settle(instance: Instance, ledger: Ledger): void {
    this.#save(instance, ledger);
    this.#arm(instance, 0);
  }

  #ring(id: string, ms: number, call: () => void): void {
    if (!this.#open) return;
    const cancel = this.#parts.clock.after(ms, () => {
      this.#alarms.delete(id);
      this.#safely(id, call);
    });
    this.#alarms.set(id, cancel);
  }

  /** What cannot be written down is tried again later: nobody is there to be told. */
  #safely(id: string, call: () => void): void {
    try {
      call();
    } catch (error) {
      this.#parts.log.error("Looking after instance {id} failed: {reason}", { id, reason: messageOf(error), error });
      this.#ring(id, this.#pause(id), () => this.#refresh(id));
    }
  }

  #pause(id: string): number {
    const instance = this.#parts.hypervisor.find(id);
    const policy = instance && this.#parts.extension.policy(instance);
    return policy ? firstDelay(policy) : 0;
  }

  /** Tells the history what it does not know of the ledger, and keeps the ledger in the same transaction. */
  #tell(instance: Instance, ledger: Ledger): void {
    const { hypervisor, log, clock } = this.#parts;
    const { id, name } = instance;
    const draft = untold(name, ledger, clock.now());
    if (!draft) return this.#save(instance, ledger);
    if (draft.type === "restart:gave_up") {
      const { attempts } = ledger;
      log.warn("Instance {name} is not restarted any more after {attempts} attempts", { name, attempts, id });
    }
    hypervisor.note(id, draft, () => this.#save(instance, { ...ledger, untold: null }));
  }

  #launch(id: string, due: number): void {
    const { places, log } = this.#parts;
    const flight: Flight = { due, attempts: this.#ledger(id).attempts, begun: false, overtaken: false };
    this.#flights.set(id, flight);
    const end = (rest: number) => {
      this.#flights.delete(id);
      this.#running.delete(running);
      this.#safely(id, () => this.#refresh(id, rest));
    };
    const running = places.run(() => this.#attempt(id, flight)).then(() => end(0), (error) => {
      log.error("Restarting instance {id} failed: {reason}", { id, reason: messageOf(error), error });
      // Where not even that could be written down, the next one must not follow at once.
      end(this.#pause(id));
    });
    this.#running.add(running);
  }

  async #attempt(id: string, flight: Flight): Promise<void> {
    const { hypervisor } = this.#parts;
    const instance = hypervisor.find(id);
    const ledger = this.#ledger(id);
    if (!instance || !this.#open || ledger.next_attempt_at !== flight.due) return;
    const attempt = ledger.attempts + (ledger.replacing ? 0 : 1);
    const origin = { ...originOf(ledger), detail: { attempt } };
    // All three are in the lane before anybody else can be. So nobody's stop joins ours and is taken for one of ours,
    // and nobody's start shares the fate of ours. A stop that comes from now on overtakes the start.
    const replaced = instance.state === "Running" && hypervisor.stop(id, origin);
    const started = hypervisor.start(id, origin, {});
    hypervisor.changed(id, ACTOR);
    const results = await Promise.allSettled([replaced, started]);
    this.#conclude(id, flight, origin, results.find((result) => result.status === "rejected")?.reason);
  }

  #conclude(id: string, flight: Flight, origin: Origin, error: unknown): void {
    const { hypervisor, log } = this.#parts;
    const instance = hypervisor.find(id);
    const ledger = this.#ledger(id);
    const code = error instanceof DormouseError ? error.code : undefined;
    if (!instance || code === "shutting_down") return;
    const { name } = instance;
    // Nothing of it was written: no change has said what comes next.
    const { due, attempts } = flight;
    const open = ledger.replacing || (ledger.next_attempt_at === due && ledger.attempts === attempts);
    if (error === undefined && flight.begun) {
      log.info("Restarted instance {name}: {reason}", { name, id, reason: origin.cause });
      hypervisor.note(id, done(name, origin, ledger));
    } else if (flight.overtaken) {
      // It is well again, then; for all else the ledger says already what comes next.
      if (open) this.#save(instance, withdrawn(ledger));
    } else if (error !== undefined && code !== "aborted") {
      const reason = messageOf(error);
      log.warn("Restarting instance {name} failed: {reason}", { name, id, reason });
      const next = open ? failed(ledger, this.#terms(instance)) : ledger;
      hypervisor.note(id, notDone(name, origin, next, reason), () => this.#save(instance, next));
    }
  }
}
