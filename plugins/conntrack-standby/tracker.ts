import type { Flow, FlowKind } from "../../main.ts";
import { ActiveFlows, type Epoch } from "./active.ts";
import { endOf, settled, type Span } from "../shared/clock.ts";
import type { Filter } from "./filter.ts";
import { FlapDetector, type FlapOptions } from "./flap.ts";

export interface TrackerOptions {
  /** All in milliseconds. */
  minAwake: number;
  halfOpenMaxAge: number;
  retryBackoff: number;
  flap: FlapOptions;
}

/** What is kept on disk of an instance, so that a countdown and a hold go on after a restart of the host. */
export interface Remembered {
  idle_since: number | null;
  last_inbound_activity_at: number | null;
  hold: Span | null;
}

/** Why a sleep that was tried did not come about. */
export interface Refusal {
  kind: "vetoed" | "failed" | "observer_error";
  plugin: string | null;
  code: string | null;
  message: string;
  at: number;
}

/** Why an instance is not put to sleep now; `ready_for_standby` where nothing is in the way. */
export type Verdict =
  | "ready_for_standby"
  | "policy_disabled"
  | "instance_not_running"
  | "observer_error"
  | "active_inbound_connections"
  | "idle_timeout_not_elapsed";

/**
 * `queued` and `confirming` (the table is being dumped) end with activity or a hold; `asked` (the guards are being
 * asked) is refused by our own guard then; from `committed` on it takes a restore.
 */
export type Phase = "queued" | "confirming" | "asked" | "committed";
export interface Attempt {
  phase: Phase;
  /** What came in between, and ends it or has it undone. */
  overtaken: "activity" | "hold" | "state" | "policy" | "observer_error" | null;
}

/** What a change of the flows means: the first one came, or the last one went. */
export type Change = "active" | "idle" | null;

/**
 * What is known of one instance, and when it may sleep. Nothing here waits, reads a clock or touches a system: every
 * method is handed the time, so that any history can be played to it.
 */
export class Tracker {
  readonly #options: TrackerOptions;
  readonly #flap: FlapDetector;
  readonly #flows: ActiveFlows;
  #visible: Filter = () => true;
  #timeout: number | undefined;
  #idleSince: number | null = null;
  #lastActivity: number | null = null;
  #hold: Span | null = null;
  /** The minimum time awake since the last wake; null while it does not run. */
  #awake: Span | null = null;
  #flapping: Span | null = null;
  #retry: Span | null = null;
  #failures = 0;
  /** May be put to sleep as far as its state goes. */
  eligible = false;
  attempt: Attempt | null = null;
  refusal: Refusal | null = null;

  constructor(options: TrackerOptions, epoch: Epoch, remembered?: Remembered) {
    this.#options = options;
    this.#flap = new FlapDetector(options.flap);
    this.#flows = new ActiveFlows(epoch);
    this.#idleSince = remembered?.idle_since ?? null;
    this.#lastActivity = remembered?.last_inbound_activity_at ?? null;
    this.#hold = remembered?.hold ?? null;
  }

  get connections(): number {
    return this.#flows.live;
  }
  get lastActivity(): number | null {
    return this.#lastActivity;
  }
  get isAwake(): boolean {
    return this.#awake !== null;
  }
  /** Wakes after automatic sleeps within the window of the flap detector. */
  get cycles(): number {
    return this.#flap.cycles;
  }

  /** A policy that is new or has changed; `timeout` in milliseconds, undefined while it is off. What is known of the flows goes. */
  configure(timeout: number | undefined, visible: Filter, now: number): void {
    // While the policy was off nobody looked.
    if (this.#flows.live > 0 || (this.#timeout === undefined && this.#awake)) this.#idleSince = now;
    this.#timeout = timeout;
    this.#visible = visible;
    this.#flows.clear();
    this.overtake("policy");
  }

  /** An event of the kernel. */
  event(kind: FlowKind, flow: Flow, now: number): Change {
    const before = this.#flows.live;
    if (this.#flows.event(kind, flow, now, this.#visible)) this.#lastActivity = now;
    return this.#changed(before, now);
  }

  /** The flows of the `epoch`th dump. */
  sync(flows: readonly Flow[] | undefined, epoch: number, now: number): Change {
    const before = this.#flows.live;
    if (this.#flows.sync(flows, epoch, now, this.#visible)) this.#lastActivity = now;
    return this.#changed(before, now);
  }

  /** Half-open flows grow old by themselves. */
  expire(now: number): Change {
    const before = this.#flows.live;
    this.#flows.expire(now, this.#options.halfOpenMaxAge);
    return this.#changed(before, now);
  }

  /** What went on in `ms` milliseconds up to `now` could not be seen, so they do not count as idle. */
  excuse(ms: number, now: number): void {
    if (this.#idleSince !== null) this.#idleSince = Math.min(this.#idleSince + ms, now);
  }

  /**
   * It runs: from the start of this host, or again. A countdown that was remembered goes on, any other begins, also where
   * nobody ever connects. Returns the milliseconds to stay awake for as flapping, after an automatic sleep (`cycle`).
   */
  woke(now: number, { cycle = false } = {}): number {
    this.#awake = { from: now, ms: this.#options.minAwake };
    this.#idleSince = this.#flows.live > 0 ? null : Math.min(this.#idleSince ?? now, now);
    this.refusal = this.#retry = null;
    const ms = cycle ? this.#flap.woken(now) : 0;
    this.#flapping = ms > 0 ? { from: now, ms } : null;
    return ms;
  }

  /** It does not run any more: it sleeps, or what it was connected to is gone. */
  left(how: "slept" | "stopped" | "paused"): void {
    this.#awake =
      this.#flapping =
      this.#retry =
      this.#idleSince =
      this.refusal =
        null;
    if (how === "slept") this.#hold = null;
    if (how === "stopped") this.#flows.forsake();
  }

  /** Flows that are known belong to one that had the address before. */
  forsake(): void {
    this.#flows.forsake();
  }

  /** Keeps it awake for `ms` milliseconds. The last hold wins, also where it is the shorter one. */
  hold(ms: number, now: number): void {
    this.#hold = { from: now, ms };
    this.overtake("hold");
  }
  release(): void {
    this.#hold = null;
  }

  /** When the hold ends; null where there is none. */
  holdUntil(now: number): number | null {
    this.#hold = settled(this.#hold, now);
    return this.#hold && endOf(this.#hold) > now ? endOf(this.#hold) : null;
  }

  idleSince(now: number): number | null {
    // One from the future was noted before the clock stepped back.
    if (this.#idleSince !== null) this.#idleSince = Math.min(this.#idleSince, now);
    return this.#flows.live > 0 ? null : this.#idleSince;
  }

  /** When it may sleep, as things stand; null while it is in use or cannot sleep at all. */
  deadline(now: number): number | null {
    const since = this.idleSince(now);
    if (!this.eligible || this.#timeout === undefined || since === null || this.#awake === null) return null;
    this.#awake = settled(this.#awake, now);
    this.#flapping = settled(this.#flapping, now);
    this.#retry = settled(this.#retry, now);
    this.#hold = settled(this.#hold, now);
    const spans = [this.#awake, this.#flapping, this.#retry, this.#hold].map(endOf);
    return Math.max(since + this.#timeout, ...spans);
  }

  /** `blind` while events may be missing. */
  verdict(now: number, blind: boolean): Verdict {
    if (this.#timeout === undefined) return "policy_disabled";
    if (!this.eligible || this.#awake === null) return "instance_not_running";
    if (blind) return "observer_error";
    if (this.#flows.live > 0) return "active_inbound_connections";
    return (this.deadline(now) ?? Infinity) <= now ? "ready_for_standby" : "idle_timeout_not_elapsed";
  }

  /** Begins an attempt; false where one is under way or something is against it. */
  request(now: number, blind: boolean): boolean {
    if (this.attempt !== null || this.verdict(now, blind) !== "ready_for_standby") return false;
    this.attempt = { phase: "queued", overtaken: null };
    return true;
  }

  /** Takes the attempt to its next phase, or says what is against that. */
  advance(attempt: Attempt, phase: Phase, now: number, blind: boolean): Attempt["overtaken"] | Verdict | null {
    if (attempt.overtaken !== null) return attempt.overtaken;
    const verdict = this.verdict(now, blind);
    if (verdict !== "ready_for_standby") return verdict;
    attempt.phase = phase;
    return null;
  }

  /** Something came in between. Of several, a connection is what matters: it may have to be answered. */
  overtake(by: NonNullable<Attempt["overtaken"]>): void {
    if (this.attempt === null) return;
    this.attempt.overtaken = by === "activity" ? by : this.attempt.overtaken ?? by;
  }

  /** The attempt has led to nothing, and is not repeated at once; failures in a row are waited for longer and longer. */
  refuse(refusal: Refusal): void {
    this.refusal = refusal;
    this.#failures = refusal.kind === "vetoed" ? 0 : this.#failures + 1;
    this.backOff(refusal.at, Math.max(this.#failures - 1, 0));
  }

  /** No attempt for the retry back-off, doubled `times` times. */
  backOff(now: number, times = 0): void {
    this.#retry = { from: now, ms: this.#options.retryBackoff * 2 ** Math.min(times, 6) };
  }

  succeeded(): void {
    this.#failures = 0;
  }

  remember(): Remembered {
    const idle_since = this.#flows.live > 0 ? null : this.#idleSince;
    return { idle_since, last_inbound_activity_at: this.#lastActivity, hold: this.#hold };
  }

  #changed(before: number, now: number): Change {
    const { live } = this.#flows;
    if (before === 0 && live > 0) {
      this.#idleSince = null;
      this.overtake("activity");
      return "active";
    }
    if (before === 0 || live > 0) return null;
    this.#idleSince = this.#awake === null ? null : now;
    return "idle";
  }
}
