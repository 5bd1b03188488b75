import type { Event } from "../../main.ts";
import type { Entry } from "./entry.ts";

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

declare module "../../main.ts" {
  interface Hooks {
    /** Every decision of conntrack-standby about an instance. */
    "standby:decision": Event<StandbyDecision>;
    /** An instance sleeps and wakes too often. */
    "standby:flapping": Event<StandbyFlapping>;
  }
}

export type Decide = (
  entry: Entry,
  decision: StandbyDecision["decision"],
  reason: string,
  detail?: Record<string, unknown>,
) => void;
