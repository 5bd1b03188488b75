import * as v from "valibot";
import type { Instance } from "../../main.ts";
import { formatDuration } from "../shared/duration.ts";
import { type Entry, ineligible } from "./entry.ts";
import { type AutoStandby, idleTimeoutOf } from "./policy.ts";

const STATUSES = [
  "unsupported",
  "disabled",
  "ineligible",
  "active",
  "idle_countdown",
  "ready_for_standby",
  "standby_requested",
  "error",
] as const;
const REASONS = [
  "unsupported_platform",
  "policy_missing",
  "policy_disabled",
  "instance_not_running",
  "network_disabled",
  "missing_ip",
  "has_vgpu",
  "active_inbound_connections",
  "idle_timeout_not_elapsed",
  "observer_error",
  "ready_for_standby",
] as const;

const Time = v.nullable(v.pipe(v.string(), v.isoTimestamp()));

/** The answer of the status and hold routes. */
export const Status = v.pipe(
  v.object({
    supported: v.boolean(),
    configured: v.boolean(),
    enabled: v.boolean(),
    eligible: v.boolean(),
    status: v.picklist(STATUSES),
    reason: v.picklist(REASONS),
    active_inbound_connections: v.pipe(v.number(), v.integer()),
    tracking_mode: v.string(),
    idle_timeout: v.nullable(v.string()),
    idle_since: Time,
    last_inbound_activity_at: Time,
    next_standby_at: Time,
    hold_until: Time,
    countdown_remaining: v.nullable(v.string()),
    refused: v.pipe(
      v.nullable(v.object({
        kind: v.picklist(["vetoed", "failed", "observer_error"]),
        plugin: v.nullable(v.string()),
        code: v.nullable(v.string()),
        message: v.string(),
        at: Time,
      })),
      v.description("Why the last attempt did not put it to sleep: the plugin whose guard refused, and its reason"),
    ),
  }),
  v.metadata({ ref: "AutoStandbyStatus" }),
);
type Status = v.InferOutput<typeof Status>;
type Standing = Pick<Status, "status" | "reason">;

export interface Subject {
  instance: Instance;
  policy: AutoStandby | undefined;
  /** Undefined where there is no policy. */
  entry: Entry | undefined;
  /** Whether the instance's driver has a standby at all. */
  supported: boolean;
  /** Whether connections may be missed now. */
  blind: boolean;
  now: number;
}

/** What the status route answers. */
export function statusOf(subject: Subject): Status {
  const { instance, policy, entry, supported, now } = subject;
  const timeout = idleTimeoutOf(policy);
  const tracker = timeout === undefined ? undefined : entry?.tracker;
  const eligible = timeout !== undefined && ineligible(instance, supported) === null;
  const deadline = eligible ? tracker?.deadline(now) ?? null : null;
  const refusal = tracker?.refusal ?? null;
  return {
    supported,
    configured: policy !== undefined,
    enabled: policy?.enabled ?? false,
    eligible,
    ...standing(subject, deadline),
    active_inbound_connections: tracker?.connections ?? 0,
    tracking_mode: "conntrack_events_v4_v6_tcp",
    idle_timeout: timeout === undefined ? null : formatDuration(timeout),
    idle_since: time(tracker?.idleSince(now) ?? null),
    last_inbound_activity_at: time(tracker?.lastActivity ?? null),
    next_standby_at: time(deadline),
    hold_until: time(tracker?.holdUntil(now) ?? null),
    countdown_remaining: deadline === null ? null : formatDuration(Math.max(0, deadline - now)),
    refused: refusal && { ...refusal, at: time(refusal.at) },
  };
}

function standing({ instance, policy, entry, supported, blind, now }: Subject, deadline: number | null): Standing {
  const against = ineligible(instance, supported);
  if (against === "unsupported_platform") return { status: "unsupported", reason: against };
  if (policy === undefined) return { status: "disabled", reason: "policy_missing" };
  if (!policy.enabled) return { status: "disabled", reason: "policy_disabled" };
  if (against !== null) return { status: "ineligible", reason: against };
  if (entry?.tracker.attempt) return { status: "standby_requested", reason: "ready_for_standby" };
  if (blind) return { status: "error", reason: "observer_error" };
  if (entry && entry.tracker.connections > 0) return { status: "active", reason: "active_inbound_connections" };
  if (deadline !== null && deadline <= now) return { status: "ready_for_standby", reason: "ready_for_standby" };
  if (entry?.tracker.refusal?.kind === "observer_error") return { status: "error", reason: "observer_error" };
  return { status: "idle_countdown", reason: "idle_timeout_not_elapsed" };
}

function time(at: number | null): string | null {
  return at === null ? null : new Date(at).toISOString();
}
