import type { Logger } from "@logtape/logtape";
import type { Conntrack, Extension, Hypervisor, StandbyFlapping, Store } from "../../main.ts";
import type { Clock } from "../shared/clock.ts";
import type { Decide } from "./decisions.ts";
import type { FilterOptions } from "./filter.ts";
import type { AutoStandby } from "./policy.ts";
import type { Remembered, TrackerOptions } from "./tracker.ts";

/** Times are milliseconds. */
export interface ControllerOptions extends TrackerOptions {
  maxConcurrent: number;
  reconcileInterval: number;
  fullSync: number;
  filter: FilterOptions;
}

/** What the controller works with. */
export interface Parts {
  conntrack: Conntrack;
  hypervisor: Hypervisor;
  store: Store;
  extension: Extension<AutoStandby, Remembered>;
  clock: Clock;
  log: Logger;
  decide: Decide;
  flapping(event: StandbyFlapping): void;
}
