import * as v from "valibot";
import { DormouseError } from "../../main.ts";
import { formatDuration, parseDuration } from "../shared/duration.ts";

const Positive = v.pipe(
  v.string(),
  v.check((text) => (parseDuration(text) ?? 0) > 0, 'expected a duration above zero such as "5s"'),
);

/** The field `restart_policy` of create and update bodies. */
export const RestartPolicy = v.strictObject({
  policy: v.optional(
    v.pipe(
      v.picklist(["never", "always", "on_failure"]),
      v.description(
        "Which ends are followed by a start; on_failure: those with an exit code that is not 0 or not known",
      ),
    ),
    "never",
  ),
  backoff: v.optional(
    v.pipe(
      Positive,
      v.description("The longest wait before the second attempt in a row; it doubles with each further one"),
    ),
    "5s",
  ),
  max_backoff: v.optional(
    v.pipe(Positive, v.description("Where the doubling ends; 5m, or backoff where that is longer")),
  ),
  max_attempts: v.optional(
    v.pipe(v.number(), v.integer(), v.minValue(0), v.description("Attempts in a row; 0 for as many as it takes")),
    0,
  ),
  stable_after: v.optional(
    v.pipe(Positive, v.description("Time in Running after which attempts are counted from zero again")),
    "10m",
  ),
  on_unhealthy: v.optional(
    v.pipe(v.boolean(), v.description("Whether an instance whose health check fails is stopped and started")),
    false,
  ),
});
export type RestartPolicy = v.InferOutput<typeof RestartPolicy>;

const MAX_BACKOFF = 300_000;

/**
 * The policy as it is kept: durations in Go's spelling, every field there. `never` is no policy.
 *
 * @throws {DormouseError} `invalid_restart_policy`
 */
export function normalise(policy: RestartPolicy, means: { health: boolean }): RestartPolicy | undefined {
  const { backoff, max_backoff, stable_after } = policy;
  const first = parseDuration(backoff)!;
  const longest = max_backoff === undefined ? Math.max(first, MAX_BACKOFF) : parseDuration(max_backoff)!;
  if (longest < first) {
    throw wrong("max_backoff", `expected at least the backoff of ${backoff}, found "${max_backoff}"`);
  }
  if (policy.on_unhealthy && !means.health) throw wrong("on_unhealthy", 'it needs the plugin "health"');
  if (policy.policy === "never") return undefined;
  return {
    ...policy,
    backoff: formatDuration(first),
    max_backoff: formatDuration(longest),
    stable_after: formatDuration(parseDuration(stable_after)!),
  };
}

/** Whether an end is followed by a start. */
export function applies(policy: RestartPolicy | undefined, failed: boolean): policy is RestartPolicy {
  return policy?.policy === "always" || (policy?.policy === "on_failure" && failed);
}

/**
 * Milliseconds to wait after so many attempts in a row: none before the first, then anything up to a bound that doubles
 * ("full jitter"), so that instances which fell together do not come back together.
 */
export function delayAfter(attempts: number, policy: RestartPolicy, random: () => number): number {
  if (attempts === 0) return 0;
  return Math.round(random() * Math.min(longestDelay(policy), firstDelay(policy) * 2 ** (attempts - 1)));
}

/** In milliseconds. */
export function firstDelay({ backoff }: RestartPolicy): number {
  return parseDuration(backoff)!;
}

/** In milliseconds. */
export function longestDelay({ max_backoff }: RestartPolicy): number {
  return parseDuration(max_backoff ?? "")!;
}

/** In milliseconds. */
export function stableAfter({ stable_after }: RestartPolicy): number {
  return parseDuration(stable_after)!;
}

function wrong(key: string, what: string): DormouseError {
  const field = `restart_policy.${key}`;
  return new DormouseError("invalid_restart_policy", `Wrong value of "${field}": ${what}`, { details: { field } });
}
