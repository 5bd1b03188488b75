import type { Instance } from "../../main.ts";
import type { AutoStandby } from "./policy.ts";
import type { Tracker } from "./tracker.ts";

/** All that the plugin has of one instance. */
export interface Entry {
  readonly id: string;
  /** As of the last event that was taken in. */
  instance: Instance;
  policy: AutoStandby;
  readonly tracker: Tracker;
  addresses: readonly string[];
  watches: Disposable[];
  /** When the timer rings, which may be before the deadline: then it is set again. */
  alarm: { at: number; cancel(): void } | null;
  /** It went to standby by us, so that the next wake ends a cycle. */
  slept: boolean;
  /** The restore that an arrival in the middle of a standby has begun. */
  race: Promise<void> | undefined;
  gone: boolean;
}

/** Where connections to the instance go. */
export function addressesOf({ network }: Instance): string[] {
  // Rows of before there was IPv6 have no `ip6` at all.
  return [network.ip, network.ip6].filter((address) => typeof address === "string");
}

/** What about an instance rules an automatic standby out, in the words of the HTTP contract; null where nothing does. */
export function ineligible(instance: Instance, supported: boolean) {
  if (!supported) return "unsupported_platform";
  if (instance.state !== "Running" || instance.transition !== null) return "instance_not_running";
  if (!instance.network.enabled) return "network_disabled";
  if (addressesOf(instance).length === 0) return "missing_ip";
  return null;
}

/** Whether it sleeps, is about to, or is being stopped: a hold comes too late. */
export function isLeaving({ state, transition }: Instance): boolean {
  if (transition === "standby" || transition === "stop" || state === "Standby" || state === "Shutdown") return true;
  return state === "Paused" && transition !== "restore" && transition !== "resume";
}
