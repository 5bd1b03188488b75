import * as v from "valibot";
import { HEALTH } from "../shared/features.ts";
import type { HealthState } from "../../main.ts";
import type { Window } from "./window.ts";

const Count = v.pipe(v.number(), v.integer());
const Time = v.nullable(v.pipe(v.string(), v.isoTimestamp()));

/** The key `health_status` of an instance's response. */
export const HealthStatus = v.pipe(
  v.object({
    status: v.picklist(HEALTH),
    consecutive_successes: Count,
    consecutive_failures: Count,
    last_checked_at: Time,
    last_success_at: Time,
    last_failure_at: Time,
    last_error: v.nullable(v.string()),
  }),
  v.metadata({ ref: "HealthStatus" }),
);
type HealthStatus = v.InferOutput<typeof HealthStatus>;

export function present(status: HealthState, window: Window | null): HealthStatus {
  return {
    status,
    consecutive_successes: window?.successes ?? 0,
    consecutive_failures: window?.failures ?? 0,
    last_checked_at: time(window?.checked_at),
    last_success_at: time(window?.succeeded_at),
    last_failure_at: time(window?.failed_at),
    last_error: window?.error ?? null,
  };
}

function time(at: number | null | undefined): string | null {
  return at === null || at === undefined ? null : new Date(at).toISOString();
}
