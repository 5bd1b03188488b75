import type { HealthState, Instance } from "../../main.ts";
import type { Check } from "./policy.ts";

/** Bytes of an error that are kept, as UTF-8. */
const ERROR_BYTES = 512;

/** What is known of an instance since it was started or restored, or its check changed. Times in milliseconds since the epoch. */
export interface Window {
  readonly since: number;
  /** Its instance has stopped or sleeps: the next run begins another. */
  readonly over: boolean;
  readonly status: "starting" | "healthy" | "unhealthy";
  readonly successes: number;
  readonly failures: number;
  readonly checked_at: number | null;
  readonly succeeded_at: number | null;
  readonly failed_at: number | null;
  readonly error: string | null;
}

/** A window in which nothing has been probed. */
export function fresh(since: number): Window {
  const times = { checked_at: null, succeeded_at: null, failed_at: null };
  return { since, over: false, status: "starting", successes: 0, failures: 0, ...times, error: null };
}

/** The window after a probe, with the error of one that failed. Failures of the start period count, but only after it. */
export function counted(window: Window, { kept, startPeriod }: Check, error: string | null, now: number): Window {
  // A clock that stepped back must not make the start period longer than it is.
  const since = Math.min(window.since, now);
  if (error === null) {
    const successes = window.successes + 1;
    const status = successes >= kept.success_threshold ? "healthy" : window.status;
    return { ...window, since, status, successes, failures: 0, checked_at: now, succeeded_at: now, error };
  }
  const failures = window.failures + 1;
  const failed = failures >= kept.failure_threshold && now - since >= startPeriod;
  const status = failed ? "unhealthy" : window.status;
  return { ...window, since, status, failures, successes: 0, checked_at: now, failed_at: now, error: cut(error) };
}

/** Milliseconds: so much is left to all others, however short an interval somebody asks for. */
const SHORTEST = 10;

/** Milliseconds to the next probe of a window; `random` from 0 to 1 spreads those that are due at once. */
export function delayOf({ checked_at }: Window, check: Check, now: number, random: number): number {
  const interval = Math.max(check.interval, SHORTEST);
  const left = checked_at === null ? 0 : Math.min(checked_at + interval - now, interval);
  return left > 0 ? left : random * Math.min(interval, 1_000);
}

/** Whether it is probed: it runs, and is not on its way to anything else. */
export function isActive({ state, transition }: Instance): boolean {
  return (state === "Running" || state === "Initializing") && transition === null;
}

/** `on` is whether it has a check. */
export function statusOf(instance: Instance, on: boolean, window: Window | null): HealthState {
  if (!on) return "disabled";
  if (!isActive(instance)) return "unknown";
  return instance.state === "Initializing" || !window || window.over ? "starting" : window.status;
}

/** The most of a text that fits, in whole code points. */
export function cut(text: string): string {
  const whole = text.toWellFormed();
  return whole.slice(0, new TextEncoder().encodeInto(whole, new Uint8Array(ERROR_BYTES)).read);
}
