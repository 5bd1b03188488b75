import { type GuardContext, type Instance, type LazyState, Veto } from "../../main.ts";
import type { Flight } from "./flight.ts";
import { type Lease, Leases } from "./leases.ts";
import type { Span } from "../shared/clock.ts";
import type { Terms } from "./policy.ts";

/** Who starts and stops lazy instances, in events and guards. */
export const ACTOR = "lazy";

/** All that the plugin has of one lazy instance. */
export interface Entry {
  readonly id: string;
  terms: Terms;
  leases: Leases;
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

/** What makes an entry again what it is now, where the change that it was told of is rolled back. Its timer is to be set. */
export function rewinding(entry: Entry): () => void {
  const { flight, alarm: _alarm, leases, ...fields } = entry;
  const [kept, flown] = [leases.list(), flight && { raised: flight.raised, starts: flight.starts }];
  return () => {
    entry.alarm?.cancel();
    Object.assign(entry, fields, { leases: new Leases(kept), alarm: null });
    if (flight) Object.assign(flight, flown);
  };
}

/** Before a stop or a standby. @throws {Veto} where somebody needs the instance, or it is not as it was found idle */
export function refuseNeeded(
  entry: Entry,
  { instance: { name, phases }, origin: { actor } }: GuardContext,
  action: "stop" | "standby",
  now: number,
): void {
  const ours = actor === ACTOR;
  const person = actor === "api" || actor.startsWith("api:");
  if ((ours || (action === "standby" && !person)) && isNeeded(entry, now)) {
    const why = entry.flight ? "an acquire waits for it" : "a lease is held";
    throw new Veto("lease_held", `instance "${name}" is needed: ${why}`);
  }
  // It was stopped and started, or leased and released, while this waited for its turn.
  const { stopping, freeSince } = entry;
  if (ours && (stopping?.phase !== phases.since || stopping.freeSince !== freeSince)) {
    throw new Veto("not_idle", `instance "${name}" is not as it was when it was found idle`);
  }
}

/** The live reading of the lazy state machine. `entry` is absent where the plugin has not seen the instance yet. */
export function readingOf({ state, transition }: Instance, entry: Entry | undefined, now: number): LazyState {
  // Nobody can tell what it does, and nobody acts on it.
  if (state === "Unknown") return "failed";
  const runs = entry && isNeeded(entry, now) ? "running" : "idle";
  // It comes back by itself: its copy is made.
  if (transition === "fork") return runs;
  // Somebody holds it where it is, and who has leased it has it still.
  if (state === "Paused" && transition === null) return runs;
  const asked = state === "Running" && entry?.stopping !== undefined;
  if (asked || state === "Shutdown" || transition === "standby" || transition === "stop") return "stopping";
  if (entry?.flight?.starts) return "starting";
  if (state === "Running") return runs;
  if (state === "Created" || state === "Initializing" || transition === "restore") return "starting";
  return entry?.failed ? "failed" : "stopped";
}
