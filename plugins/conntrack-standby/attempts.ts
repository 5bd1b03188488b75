import type { Logger } from "@logtape/logtape";
import { DormouseError, type GuardContext, type Hypervisor, Veto } from "../../main.ts";
import { retry } from "../shared/async.ts";
import { messageOf } from "../shared/errors.ts";
import type { Clock } from "../shared/clock.ts";
import type { Decide } from "./decisions.ts";
import type { Dumps } from "./dumps.ts";
import type { Entry } from "./entry.ts";
import type { Attempt } from "./tracker.ts";

/** Who asks, in the origin of every standby and restore of this plugin. */
export const ACTOR = "auto-standby";
export const PLUGIN = "conntrack-standby";

/** Of a restore that fails: it is tried again, since somebody waits for it. */
const RESTORE = { maxAttempts: 5, minTimeout: 250, maxTimeout: 5_000 };
/** Milliseconds between dumps after a standby, until one succeeds. */
const VERIFY = { first: 1_000, last: 60_000 };
/** Codes of actions that somebody else's action has made pointless. */
const OVERTAKEN = ["aborted", "invalid_state", "not_found", "shutting_down"];

export interface AttemptsOptions {
  hypervisor: Hypervisor;
  dumps: Dumps;
  clock: Clock;
  log: Logger;
  maxConcurrent: number;
  /** Whether events may be missing now. */
  blind(): boolean;
  decide: Decide;
  /** The attempt is over, however it went. */
  settled(entry: Entry): void;
}

/** Puts instances to sleep that are due: at most so many at a time, each only after all that could be against it. */
export class Attempts {
  readonly #options: AttemptsOptions;
  readonly #queue = new Set<Entry>();
  readonly #tasks = new Set<Promise<void>>();
  readonly #pauses = new Set<() => void>();
  #running = 0;
  #closed = false;

  constructor(options: AttemptsOptions) {
    this.#options = options;
  }

  /** Instances that wait for their turn, and those that are on their way. */
  get sizes(): { queued: number; in_flight: number } {
    return { queued: this.#queue.size, in_flight: this.#tasks.size };
  }

  /** Queues the instance if it may sleep now. */
  offer(entry: Entry): void {
    const { clock, blind, decide } = this.#options;
    if (this.#closed || !entry.tracker.request(clock.now(), blind())) return;
    this.#queue.add(entry);
    decide(entry, "requested", "ready_for_standby");
    this.#pump();
  }

  /** Something may have come in between: what is queued is dropped, and what is on its way to sleep comes back. */
  overtaken(entry: Entry): void {
    const { attempt } = entry.tracker;
    if (!attempt?.overtaken) return;
    if (attempt.phase === "queued") {
      this.#queue.delete(entry);
      this.#cancel(entry, attempt.overtaken);
    } else if (attempt.phase === "committed" && attempt.overtaken === "activity") void this.#restore(entry);
  }

  /** For the queued ones, as {@linkcode overtaken}. */
  overtakeQueued(by: NonNullable<Attempt["overtaken"]>): void {
    for (const entry of [...this.#queue]) {
      entry.tracker.overtake(by);
      this.overtaken(entry);
    }
  }

  /** Under the instance's lock, right before it goes: the last look at what came in meanwhile. @throws {Veto} */
  guard(entry: Entry | undefined, { origin, instance }: GuardContext): void {
    if (origin.actor !== ACTOR) return;
    const { clock, blind } = this.#options;
    const attempt = entry?.tracker.attempt;
    const against = this.#closed || !attempt
      ? "closing"
      : entry!.tracker.advance(attempt, "committed", clock.now(), blind());
    if (against !== null) throw new Veto(against, `instance "${instance.name}" is not idle any more: ${against}`);
  }

  /** Nothing is begun from here on; resolves once what was has ended. */
  async close(): Promise<void> {
    this.#closed = true;
    for (const entry of this.#queue) this.#cancel(entry, "closing");
    this.#queue.clear();
    for (const wake of this.#pauses) wake();
    await Promise.allSettled(this.#tasks);
  }

  #pump(): void {
    for (const entry of this.#queue) {
      if (this.#running >= this.#options.maxConcurrent) return;
      this.#queue.delete(entry);
      this.#running++;
      void this.#task(
        this.#run(entry).finally(() => {
          this.#running--;
          this.#pump();
        }),
      );
    }
  }

  async #run(entry: Entry): Promise<void> {
    const { hypervisor, dumps, clock, blind, decide } = this.#options;
    const { tracker, id, policy } = entry;
    const attempt = tracker.attempt!;
    attempt.phase = "confirming";
    try {
      await dumps.take();
    } catch (error) {
      const message = messageOf(error);
      return this.#refuse(entry, { kind: "observer_error", plugin: PLUGIN, code: null, message });
    }
    const against = this.#closed ? "closing" : tracker.advance(attempt, "asked", clock.now(), blind());
    if (against !== null) return this.#cancel(entry, against);
    const idleSince = new Date(tracker.idleSince(clock.now())!).toISOString();
    const detail = { idle_since: idleSince, idle_timeout: policy.idle_timeout };
    try {
      await hypervisor.standby(id, { actor: ACTOR, cause: "idle", detail });
    } catch (error) {
      return await this.#failed(entry, attempt, error);
    }
    attempt.phase = "committed"; // also where it has joined a standby that others asked for, past our guard
    tracker.succeeded();
    decide(entry, "slept", "idle", detail);
    this.overtaken(entry);
    void this.#task(this.#verify(entry));
  }

  /** A flow that began before it slept may be told of late, or its event be lost: only the table is sure. */
  async #verify(entry: Entry): Promise<void> {
    const { hypervisor, dumps, log } = this.#options;
    for (let wait = VERIFY.first; !this.#closed && !entry.race; wait = Math.min(wait * 2, VERIFY.last)) {
      if (entry.gone || hypervisor.find(entry.id)?.state !== "Standby") break;
      try {
        await dumps.take(); // what it finds comes back by `overtaken`
        break;
      } catch (error) {
        const reason = messageOf(error);
        log.warn("Cannot verify that sleeping instance {id} is idle: {reason}", { id: entry.id, reason, error });
        await this.#pause(wait);
      }
    }
    await entry.race;
    this.#finish(entry);
  }

  async #failed(entry: Entry, attempt: Attempt, error: unknown): Promise<void> {
    const { code, details, message } = error instanceof DormouseError
      ? error
      : { code: "internal_error", details: undefined, message: messageOf(error) };
    if (entry.race) {
      await entry.race;
      return this.#finish(entry);
    }
    if (code === "vetoed" && details?.plugin === PLUGIN) return this.#cancel(entry, String(details.code));
    if (OVERTAKEN.includes(code)) {
      entry.tracker.backOff(this.#options.clock.now());
      return this.#cancel(entry, attempt.overtaken ?? code);
    }
    if (code === "vetoed") {
      const [plugin, own, reason] = [details?.plugin, details?.code, details?.reason].map(String);
      return this.#refuse(entry, { kind: "vetoed", plugin, code: own, message: reason });
    }
    this.#refuse(entry, { kind: "failed", plugin: null, code, message });
  }

  /** Called again, it is the same restore. */
  #restore(entry: Entry): Promise<void> {
    const { hypervisor, decide, log } = this.#options;
    const origin = { actor: ACTOR, cause: "raced", detail: { connections: entry.tracker.connections } };
    const isRetriable = (error: unknown) => !this.#closed && !isOvertaken(error);
    const restore = async () => {
      try {
        await retry(() => hypervisor.restore(entry.id, origin), { ...RESTORE, isRetriable });
        decide(entry, "raced_restored", "active_inbound_connections");
      } catch (error) {
        const reason = messageOf(error);
        if (isOvertaken(error)) return decide(entry, "cancelled", reason);
        log.error("Restoring instance {id} for who connected failed: {reason}", { id: entry.id, reason, error });
        decide(entry, "restore_failed", reason);
      }
    };
    return entry.race ??= this.#task(restore());
  }

  #refuse(entry: Entry, refusal: { kind: "vetoed" | "failed" | "observer_error" } & Blame): void {
    const { clock, decide } = this.#options;
    entry.tracker.refuse({ ...refusal, at: clock.now() });
    const { kind, plugin, code, message } = refusal;
    decide(entry, kind === "vetoed" ? "vetoed" : "failed", code ?? kind, { plugin, message });
    this.#finish(entry);
  }

  #cancel(entry: Entry, reason: string): void {
    this.#options.decide(entry, "cancelled", reason);
    this.#finish(entry);
  }

  #finish(entry: Entry): void {
    entry.tracker.attempt = null;
    entry.race = undefined;
    if (!this.#closed) this.#options.settled(entry);
  }

  #pause(ms: number): Promise<void> {
    return new Promise((resolve) => {
      const done = () => {
        cancel();
        this.#pauses.delete(done);
        resolve();
      };
      const cancel = this.#options.clock.after(ms, done);
      this.#pauses.add(done);
    });
  }

  #task(work: Promise<void>): Promise<void> {
    const task = work.finally(() => this.#tasks.delete(task));
    this.#tasks.add(task);
    return task;
  }
}

function isOvertaken(error: unknown): boolean {
  return error instanceof DormouseError && OVERTAKEN.includes(error.code);
}

interface Blame {
  plugin: string | null;
  code: string | null;
  message: string;
}
