import type { Instance, LazyState } from "../../main.ts";
import type { Flight } from "./flight.ts";
import type { Lease, Leases } from "./leases.ts";
import type { Span } from "../shared/clock.ts";
import type { Terms } from "./policy.ts";

/** Who starts and stops lazy instances, in events and guards. */
export const ACTOR = "lazy";

/** All that the plugin has of one lazy instance. */
export interface Entry {
  readonly id: string;
  terms: Terms;
  readonly leases: Leases;
  /** Since when it has run without anybody who needs it, in milliseconds since the epoch. */
  freeSince: number;
  /** Leases ever granted. */
  granted: number;
  /** The last start did not work. */
  failed: boolean;
  /** It was stopped by us, after so many seconds, and the note of that is not written yet. */
  unsaid: number | null;
  /** The acquire under way. */
  flight: Flight | undefined;
  stopping: Stopping | undefined;
  /** No stop is tried before its end; failures in a row make it longer. */
  retry: (Span & { readonly failures: number }) | null;
  /** When the timer rings, which may be too early: then it is set again. */
  alarm: { readonly at: number; cancel(): void } | null;
  /** The instance is gone, or not lazy any more. */
  gone: boolean;
}

/** A stop that we have asked for. */
export interface Stopping {
  /** When the phase began in which the instance was found idle, and since when it was: both must be so still. */
  readonly phase: number;
  readonly freeSince: number;
}

/** What is kept of an instance on disk. */
export interface Remembered {
  readonly leases: readonly Lease[];
  readonly free_since: number;
  readonly granted: number;
  readonly failed: boolean;
  readonly unsaid: number | null;
}

export function remembered({ leases, freeSince, granted, failed, unsaid }: Entry): Remembered {
  return { leases: leases.list(), free_since: freeSince, granted, failed, unsaid };
}

/** Whether anybody needs the instance, or waits for it. */
export function isNeeded({ flight, leases }: Entry, now: number): boolean {
  return flight !== undefined || leases.held(now);
}

/** The live reading of the lazy state machine. `entry` is absent where the plugin has not seen the instance yet. */
export function readingOf({ state, transition }: Instance, entry: Entry | undefined, now: number): LazyState {
  // Nobody can tell what it does, and nobody acts on it.
  if (state === "Unknown") return "failed";
  const runs = entry && isNeeded(entry, now) ? "running" : "idle";
  // It comes back by itself: its copy is made.
  if (transition === "fork") return runs;
  const asked = state === "Running" && entry?.stopping !== undefined;
  if (asked || state === "Shutdown" || transition === "standby" || transition === "stop") return "stopping";
  if (entry?.flight?.starts) return "starting";
  if (state === "Running") return runs;
  if (state === "Created" || state === "Initializing" || transition === "restore") return "starting";
  return entry?.failed ? "failed" : "stopped";
}
