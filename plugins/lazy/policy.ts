import * as v from "valibot";
import { DormouseError, type Driver, type Instance } from "../../main.ts";
import { formatDuration, parseDuration } from "../shared/duration.ts";
import { about } from "../shared/schemas.ts";

const IDLE_STOP = "5m";
const START_TIMEOUT = "60s";

/** The field `lazy` of create and update bodies. */
export const LazyPolicy = v.strictObject({
  enabled: v.optional(about("Whether it runs only for those who acquire it", v.boolean()), false),
  idle_stop: v.optional(v.pipe(
    v.string(),
    v.description(`Go duration without a lease after which the instance is stopped; "${IDLE_STOP}" when absent`),
  )),
  start_timeout: v.optional(v.pipe(
    v.string(),
    v.description(`How long an acquire waits until the instance is ready; "${START_TIMEOUT}" when absent`),
  )),
  via: v.optional(v.pipe(
    v.picklist(["stop", "standby"]),
    v.description('How it is stopped, "stop" when absent; "standby" where its driver has that'),
  )),
});
export type LazyPolicy = v.InferOutput<typeof LazyPolicy>;

/** A policy that is on, in milliseconds. */
export interface Terms {
  readonly idleStop: number;
  readonly startTimeout: number;
  readonly via: "stop" | "standby";
}

/** The policy as it is kept. One that is off keeps nothing else. @throws {DormouseError} `invalid_lazy` */
export function normalise(policy: LazyPolicy, instance: Instance, drivers: readonly Driver[]): LazyPolicy {
  if (!policy.enabled) return { enabled: false };
  const { idle_stop = IDLE_STOP, start_timeout = START_TIMEOUT, via = "stop" } = policy;
  const driver = drivers.find(({ name }) => name === instance.driver);
  if (via === "standby" && !driver?.features.has("standby")) {
    throw wrong("via", `driver "${instance.driver}" has no standby`);
  }
  const durations = {
    idle_stop: canonical("idle_stop", idle_stop),
    start_timeout: canonical("start_timeout", start_timeout),
  };
  return { enabled: true, ...durations, via };
}

/** Undefined where the instance is not lazy. */
export function termsOf(policy: LazyPolicy | undefined): Terms | undefined {
  if (!policy?.enabled) return undefined;
  const { idle_stop = IDLE_STOP, start_timeout = START_TIMEOUT, via = "stop" } = policy;
  return { idleStop: parseDuration(idle_stop)!, startTimeout: parseDuration(start_timeout)!, via };
}

function canonical(key: string, text: string): string {
  const ms = parseDuration(text.trim());
  if (ms !== undefined && ms > 0) return formatDuration(ms);
  throw wrong(key, `expected a duration above zero such as "5m", found ${JSON.stringify(text.slice(0, 100))}`);
}

function wrong(key: string, why: string): DormouseError {
  const field = `lazy.${key}`;
  return new DormouseError("invalid_lazy", `Wrong value of "${field}": ${why}`, { details: { field } });
}
