import * as v from "valibot";
import type { CommitContext, Instance } from "../../main.ts";
import { applies, delayAfter, type RestartPolicy, stableAfter } from "./policy.ts";

export const ACTOR = "restart";
/** Why an instance is restarted that did not end by itself. */
export const UNHEALTHY = "health_check_failed";

/** What is kept of an instance, on disk with each change that it follows from. Times are milliseconds since the epoch. */
export interface Ledger {
  /** Attempts in a row. */
  readonly attempts: number;
  readonly last_attempt_at: number | null;
  /** When it is to be started, or replaced where it runs. */
  readonly next_attempt_at: number | null;
  readonly blocked_reason: "manual_stop" | "max_attempts_exceeded" | null;
  readonly last_reason: typeof UNHEALTHY | null;
  /** What the attempt that is next, or that will not be made, is about. */
  readonly reason: string | null;
  /** How its last run ended, where nobody asked for that. */
  readonly ended: { readonly reason: string; readonly failed: boolean } | null;
  /** Milliseconds in `Running` since the last attempt, and since when it is `Running` now. */
  readonly ran: { readonly ms: number; readonly since: number | null };
  /** It is being stopped only to be started again. */
  readonly replacing: boolean;
  /** What its history has not been told yet. */
  readonly untold: "restart:scheduled" | "restart:gave_up" | null;
  /** The instance's `started_at`: where that is another one, it was started while nobody kept this. */
  readonly run: number | null;
}

export const BLANK: Ledger = {
  attempts: 0,
  last_attempt_at: null,
  next_attempt_at: null,
  blocked_reason: null,
  last_reason: null,
  reason: null,
  ended: null,
  ran: { ms: 0, since: null },
  replacing: false,
  untold: null,
  run: null,
};

/** What decides about an instance beside its ledger. */
export interface Terms {
  policy: RestartPolicy | undefined;
  now: number;
  /** From 0 to 1. */
  random: () => number;
}

/** The ledger for a host that has just started, after one or more that may have run without this plugin. */
export function resumed(ledger: Ledger, { state, transition, started_at }: Instance, now: number): Ledger {
  if (ledger.run !== started_at) return BLANK;
  // What was interrupted is yet to be brought to its end, which is a change like any other.
  if (transition !== null) return ledger;
  const runs = state === "Running";
  const held = runs ? !ledger.replacing : state === "Stopped" && ledger.ended !== null;
  const since = runs && ledger.attempts > 0 ? ledger.ran.since ?? now : null;
  return { ...(held ? ledger : withdrawn(ledger)), ran: { ...ledger.ran, since } };
}

/** The ledger after a change of its instance. */
export function follow(ledger: Ledger, { event, before, after }: CommitContext, terms: Terms): Ledger {
  if (!before || !after) return ledger;
  const ours = event.actor === ACTOR;
  const kept = timed(ledger, before, after, event.cause, terms.now);
  const begun = after.transition === before.transition ? null : after.transition;
  if (begun === "stop" && ours) return { ...attempted(kept, terms.now), replacing: true };
  if (begun === "stop") return stopped(kept);
  if (begun === "start" && ours) {
    return kept.replacing ? { ...withdrawn(kept), ended: null } : attempted(kept, terms.now);
  }
  if (begun === "start") return BLANK;
  if (begun === "delete") return withdrawn(kept);
  if (after.state === "Stopped" && before.state !== "Stopped") return atEnd(kept, before, after, event.cause, terms);
  if (kept.replacing && before.transition === "stop") {
    // It could not be stopped. Where it goes on running, it is as unwell as before.
    return after.state === "Running" ? scheduled({ ...kept, replacing: false }, UNHEALTHY, terms) : withdrawn(kept);
  }
  // A stop did not work, and by now somebody wants it to run.
  const wanted = !ours && (event.action === "restore" || event.action === "resume");
  if (wanted && kept.blocked_reason === "manual_stop") return { ...kept, blocked_reason: null };
  if (after.state !== before.state) return withdrawn(kept);
  if (event.action === "update" && changed(before, after)) return renewed(kept, after, terms);
  return kept;
}

/** Somebody wants it to be stopped. */
export function stopped(ledger: Ledger): Ledger {
  return { ...withdrawn(ledger), blocked_reason: "manual_stop", reason: null, untold: null };
}

/** With an attempt that is due after the back-off, or none any more where there were too many. */
export function scheduled(ledger: Ledger, reason: string, { policy, now, random }: Terms): Ledger {
  if (!policy) return withdrawn(ledger);
  const about = { ...ledger, reason, ...(reason === UNHEALTHY && { last_reason: UNHEALTHY } as const) };
  if (policy.max_attempts > 0 && ledger.attempts >= policy.max_attempts) {
    return { ...about, next_attempt_at: null, blocked_reason: "max_attempts_exceeded", untold: "restart:gave_up" };
  }
  const next_attempt_at = now + delayAfter(ledger.attempts, policy, random);
  return { ...about, next_attempt_at, untold: "restart:scheduled" };
}

/** After an attempt whose own row was never written, because something was against it. */
export function failed(ledger: Ledger, terms: Terms): Ledger {
  const counted = ledger.replacing ? ledger : attempted(ledger, terms.now);
  return scheduled({ ...counted, ended: ledger.ended, replacing: false }, "start_failed", terms);
}

/** No attempt is due any more. */
export function withdrawn(ledger: Ledger): Ledger {
  const untold = ledger.untold === "restart:scheduled" ? null : ledger.untold;
  return { ...ledger, next_attempt_at: null, replacing: false, untold };
}

/** Milliseconds in `Running` since the last attempt. */
export function ranFor({ ran: { ms, since } }: Ledger, now: number): number {
  return ms + (since === null ? 0 : Math.max(0, now - since));
}

/** Whether nothing in it is worth keeping. */
export function isBlank({ run: _run, ran: _ran, ...rest }: Ledger): boolean {
  return Object.entries(rest).every(([key, value]) => value === BLANK[key as keyof Ledger]);
}

const Time = v.nullable(v.pipe(v.string(), v.isoTimestamp()));

/** The key `restart_status` of an instance's response. */
export const Status = v.pipe(
  v.object({
    attempts: v.pipe(v.number(), v.integer(), v.description("Restarts in a row, since it last ran for stable_after")),
    last_attempt_at: Time,
    next_attempt_at: Time,
    blocked_reason: v.nullable(v.picklist(["manual_stop", "max_attempts_exceeded"])),
    last_reason: v.pipe(
      v.nullable(v.picklist([UNHEALTHY])),
      v.description("The last reason that was no end of its own"),
    ),
  }),
  v.metadata({ ref: "RestartStatus" }),
);

/** Undefined where there is nothing to say. */
export function statusOf(ledger: Ledger): v.InferOutput<typeof Status> | undefined {
  const { attempts, last_attempt_at, next_attempt_at, blocked_reason, last_reason } = ledger;
  if (
    attempts === 0 && [last_attempt_at, next_attempt_at, blocked_reason, last_reason].every((each) => each === null)
  ) {
    return undefined;
  }
  const [last, next] = [last_attempt_at, next_attempt_at].map((at) => at === null ? null : new Date(at).toISOString());
  return { attempts, last_attempt_at: last, next_attempt_at: next, blocked_reason, last_reason };
}

/** Running time is kept only while there are attempts that it could make forgotten. */
function timed(ledger: Ledger, before: Instance, after: Instance, cause: string, now: number): Ledger {
  const [ran, runs] = [before.state === "Running", after.state === "Running"];
  if (ran === runs || ledger.attempts === 0) return ledger;
  if (runs) return { ...ledger, ran: { ...ledger.ran, since: now } };
  // When it ended while no host looked is not known: from the last start on, or a moment ago.
  const unseen = cause === "recovery" && after.state === "Stopped";
  return { ...ledger, ran: { ms: unseen ? ledger.ran.ms : ranFor(ledger, now), since: null } };
}

function attempted(ledger: Ledger, now: number): Ledger {
  const fresh = { ended: null, ran: BLANK.ran };
  return { ...withdrawn(ledger), ...fresh, attempts: ledger.attempts + 1, last_attempt_at: now };
}

function atEnd(ledger: Ledger, before: Instance, after: Instance, cause: string, terms: Terms): Ledger {
  // A copy that was made in this state has not ended.
  if (before.transition === "create") return ledger;
  if (before.transition === "stop") {
    if (!ledger.replacing) return ledger;
    return { ...ledger, next_attempt_at: terms.now, ended: { reason: UNHEALTHY, failed: true } };
  }
  const { policy } = terms;
  const ended = endOf(before, after, cause);
  const pending = ledger.next_attempt_at !== null;
  const idle = { ...withdrawn(ledger), ended };
  if (ledger.blocked_reason !== null) return idle;
  if (!applies(policy, ended.failed)) return { ...BLANK, ended };
  const stable = !pending && ranFor(ledger, terms.now) >= stableAfter(policy);
  const next = scheduled(stable ? { ...BLANK, ended } : idle, ended.reason, terms);
  // Who has overtaken a start, to stop it or to delete it, is about to say what becomes of it.
  return ended.reason.endsWith("_aborted") && next.untold === "restart:scheduled" ? { ...next, untold: null } : next;
}

/** How it ended, which nobody asked for. */
function endOf({ transition }: Instance, { exit_code }: Instance, cause: string): NonNullable<Ledger["ended"]> {
  // The registry's word for an action that did not work; what the exit code says then may be of the run before.
  const raised = transition === "start" || transition === "restore";
  if (raised && cause.startsWith(`${transition}_`)) return { reason: cause, failed: true };
  return { reason: exit_code === null ? "exit_unknown" : `exit_code_${exit_code}`, failed: exit_code !== 0 };
}

function changed(before: Instance, after: Instance): boolean {
  return JSON.stringify(before.policies.restart_policy) !== JSON.stringify(after.policies.restart_policy);
}

function renewed(ledger: Ledger, { state }: Instance, terms: Terms): Ledger {
  if (ledger.blocked_reason === "manual_stop") return ledger;
  const cleared = { ...BLANK, ended: ledger.ended };
  if (state !== "Stopped" || !ledger.ended || !applies(terms.policy, ledger.ended.failed)) return cleared;
  return scheduled(cleared, ledger.ended.reason, terms);
}
