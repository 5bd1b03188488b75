/**
 * The vocabulary of the features: hooks and services by which plugins that know nothing of each other meet. `main.ts`
 * exports the types again and has the hooks of the instances themselves.
 */
import type { Action, Event, Guard, Instance, Origin, State } from "../../main.ts";

// Notes: what happened to an instance and is no change of its state.

/** An entry of an instance's history beside its changes; its `seq` is of the same sequence as theirs. */
export interface Note {
  readonly seq: number;
  /** Milliseconds since the epoch. */
  readonly at: number;
  /** As `health:changed`. */
  readonly type: string;
  /** Its name on streams and webhooks: that of its kind, else the type. */
  readonly event: string;
  readonly instance_id: string;
  readonly instance: Instance;
  readonly actor: string;
  readonly cause: string;
  /** One line for people. */
  readonly summary: string;
  readonly detail: Readonly<Record<string, unknown>>;
}
export interface NoteDraft {
  type: string;
  origin: Origin;
  summary: string;
  detail?: Record<string, unknown>;
}
/** What a plugin says of a type of note before it takes any. */
export interface NoteKind {
  help: string;
  /** The name on streams and webhooks where it is not the type. */
  event?: string;
}

// The registry.

/** A request that the registry has carried out, or has not; requests that join another are told of once. */
export interface ActionDone {
  readonly action: Action;
  readonly instance_id: string;
  readonly driver: string;
  /** `refused`: a rule, a guard or the body was against it. `aborted`: a later request overtook it. */
  readonly result: "ok" | "refused" | "aborted" | "failed";
  readonly duration_ms: number;
  readonly actor: string;
}
/** A request for what is so already, which makes no event. */
export interface Fulfilled {
  readonly action: Action;
  readonly instance: Instance;
  readonly origin: Origin;
}

// The API.

/** One HTTP request that was answered; for a stream, when its headers were sent. */
export interface ApiRequest {
  readonly method: string;
  /** The pattern, `/instances/:id`; `none` where there is no such route. */
  readonly route: string;
  readonly status: number;
  readonly duration_ms: number;
}
/** A stream of Server-Sent Events to one client. */
export interface EventStream {
  /** Resolves when the client has taken it, which is what holds back who sends; at once when it has left. */
  send(message: { id?: string; event?: string; data: string }): Promise<void>;
  /** Aborts when the client leaves or the host closes. */
  readonly signal: AbortSignal;
}

// Health.

export const HEALTH = ["disabled", "unknown", "starting", "healthy", "unhealthy"] as const;
export type HealthState = (typeof HEALTH)[number];

export interface HealthChange {
  readonly instance_id: string;
  readonly instance: Instance;
  readonly at: number;
  readonly from: HealthState;
  readonly to: HealthState;
  /** Why, where it is not well. */
  readonly error: string | null;
}
export interface HealthProbed {
  readonly instance_id: string;
  readonly type: "http" | "tcp" | "exec";
  readonly ok: boolean;
  readonly duration_ms: number;
}
export interface Health {
  stateOf(instance: Instance): HealthState;
  /** Probes under way, and those that wait for a place among them. */
  stats(): { running: number; waiting: number };
}

// Sleep and wake.

/** One step on an instance's way to sleep, or what kept it from going. */
export interface StandbyDecision {
  readonly instance_id: string;
  readonly instance_name: string;
  /** Milliseconds since the epoch. */
  readonly at: number;
  /**
   * `requested`: its time has come, it is queued. `cancelled`: something came in between, named by `reason`. `slept`.
   * `vetoed`, `failed`: it stays awake and is tried again. `raced_restored`: who connected in the middle had it brought
   * back at once; `restore_failed`: that did not work.
   */
  readonly decision: "requested" | "cancelled" | "slept" | "vetoed" | "failed" | "raced_restored" | "restore_failed";
  readonly reason: string;
  readonly detail: Readonly<Record<string, unknown>>;
}
/** An instance that went to sleep and was woken so often that it is left awake for a while. */
export interface StandbyFlapping {
  readonly instance_id: string;
  readonly instance_name: string;
  readonly at: number;
  /** Within the window that the option `flap_window` gives. */
  readonly cycles: number;
  /** Milliseconds. */
  readonly awake_for: number;
}
export interface StandbyStats {
  /** Instances with an enabled policy that are awake: in use, counting down. */
  readonly active: number;
  readonly idle: number;
  /** Flows that keep instances awake. */
  readonly flows: number;
  readonly queued: number;
  /** On their way to sleep, to the look at the table after it. */
  readonly in_flight: number;
}
export interface AutoStandbyService {
  stats(): StandbyStats;
}

/** What made an instance wake: a published port, `http_listen`, or a connection to its own address. */
export type WakeCause = "port" | "http" | "connection";
/** One attempt to wake an instance. */
export interface WakeDone {
  readonly instance_id: string;
  readonly name: string;
  readonly cause: WakeCause;
  /** Null where it runs now. */
  readonly error: string | null;
  /** Milliseconds from the first connection to `Running`. */
  readonly latency_ms: number;
}
/** What the plugin `wake` has done since the host started, and does now. */
export interface WakeStats {
  /** Attempts to wake an instance that brought it back, and that did not. */
  readonly wakes: number;
  readonly failed: number;
  /** Connections and requests that came here, and those of them that were refused. */
  readonly connections: number;
  readonly refused: number;
  /** Requests for hosts that nobody has. */
  readonly unknown_hosts: number;
  /** Connections that wait, and that are passed on, now. */
  readonly held: number;
  readonly piped: number;
}
export interface Wake {
  stats(): WakeStats;
  /** Where `http_listen` listens, once the host is up. */
  readonly url: string | null;
}

// Restart and lazy.

export interface Restart {
  /** Instances that wait for their next attempt, and that get none any more, by reason. */
  stats(): { waiting: number; blocked: Readonly<Record<string, number>> };
}

export const LAZY = ["stopped", "starting", "running", "idle", "stopping", "failed"] as const;
/**
 * `running`: leases are held. `idle`: none is, the idle window passes. `failed`: the last start did not work, or nobody can
 * tell what the instance does. `stopped`: it does not run; it may be asleep or paused.
 */
export type LazyState = (typeof LAZY)[number];
export interface Lazy {
  stats(): { states: Readonly<Record<LazyState, number>>; leases: number };
}

// The journal.

/** A row of the journal: a change (`type` is its action) or a note. */
export interface JournalRow {
  readonly seq: number;
  readonly instance_id: string;
  readonly instance_name: string;
  readonly type: string;
  readonly event: string;
  readonly at: number;
  /** Null for notes. */
  readonly from: State | null;
  readonly to: State | null;
  readonly actor: string;
  readonly cause: string;
  /** Null for changes. */
  readonly summary: string | null;
  readonly detail: Readonly<Record<string, unknown>>;
}
export interface JournalQuery {
  /** Rows with a `seq` above it. */
  after: number;
  limit: number;
  instance?: string;
  /** Types or names of events. */
  types?: readonly string[];
}
export interface WebhookStats {
  /** Without its query. */
  readonly url: string;
  /** Rows that it has not been sent; those that it has yet to look at count whatever their type. */
  readonly backlog: number;
  /** Since the oldest of these. */
  readonly lag_ms: number;
  /** Attempts that failed, rows that were taken, and rows that were pruned before, since the host started. */
  readonly failed: number;
  readonly sent: number;
  readonly lost: number;
}
export interface Journal {
  /** In order of `seq`. */
  read(query: JournalQuery): JournalRow[];
  /** The lowest `seq` from which on nothing has been pruned, and the last one written; 1 and 0 for an empty journal. */
  readonly first: number;
  readonly last: number;
  /** Calls after each commit of one or more rows. */
  follow(listener: () => void): Disposable;
  stats(): {
    readonly rows: number;
    readonly pruned: number;
    readonly streams: number;
    readonly webhooks: readonly WebhookStats[];
  };
}

declare module "../../main.ts" {
  interface Hooks {
    /** Each note, after it is on disk. */
    "note:event": Event<Note>;
    /** Each request of the registry, after it. */
    "action:done": Event<ActionDone>;
    /** Under the lock, before the answer: what was asked for is so already. For those who keep what is wanted. */
    "action:fulfilled": Guard<Fulfilled>;
    /** Each HTTP request, after it. */
    "api:request": Event<ApiRequest>;
    /** The health of an instance is another, after it is on disk. */
    "health:changed": Event<HealthChange>;
    /** Each probe whose result counted. */
    "health:probed": Event<HealthProbed>;
    /** Every decision of conntrack-standby about an instance. */
    "standby:decision": Event<StandbyDecision>;
    /** An instance sleeps and wakes too often. */
    "standby:flapping": Event<StandbyFlapping>;
    /** Each attempt to wake an instance, after it. */
    "wake:done": Event<WakeDone>;
    /** The instance runs and somebody waits for it: passes when it is healthy, else a throw has it asked again. */
    "wake:ready": Guard<{ readonly instance: Instance; readonly signal: AbortSignal }>;
  }
  interface Services {
    health: Health;
    restart: Restart;
    lazy: Lazy;
    journal: Journal;
    wake: Wake;
    "conntrack-standby": AutoStandbyService;
  }
}
