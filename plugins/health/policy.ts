import * as v from "valibot";
import { DormouseError, type Instance } from "../../main.ts";
import { formatDuration, parseDuration } from "../shared/duration.ts";
import { about, text } from "../shared/schemas.ts";

const Port = v.pipe(v.number(), v.integer(), v.minValue(1), v.maxValue(65_535));
const Duration = v.pipe(
  v.string(),
  v.check((text) => (parseDuration(text) ?? 0) > 0, 'expected a duration above zero such as "10s"'),
);
const Threshold = v.pipe(v.number(), v.integer(), v.minValue(0));

/** The field `health_check` of create and update bodies. */
export const HealthCheck = v.strictObject({
  type: v.optional(
    v.pipe(v.picklist(["none", "http", "tcp", "exec"]), v.description("That of the block which is there, when absent")),
  ),
  interval: v.optional(v.pipe(Duration, v.description("From the end of one probe to the begin of the next")), "10s"),
  timeout: v.optional(
    v.pipe(Duration, v.description("Of one probe; at most the interval, and 2s or that when absent")),
  ),
  start_period: v.optional(
    v.pipe(
      v.string(),
      v.check((text) => (parseDuration(text) ?? -1) >= 0, 'expected a duration such as "30s"'),
      v.description("How long after its start failures do not make it unhealthy"),
    ),
    "30s",
  ),
  failure_threshold: v.optional(v.pipe(Threshold, v.description("Failures in a row; 0 is the default")), 3),
  success_threshold: v.optional(v.pipe(Threshold, v.description("Successes in a row; 0 is the default")), 1),
  http: v.optional(about(
    "A GET",
    v.strictObject({
      port: about("Of the instance", Port),
      path: v.optional(
        v.pipe(
          v.string(),
          v.regex(/^\/[!"$-~]*$/, "expected a path of printable ASCII that begins with /"),
          v.description("With its query, if it has one"),
        ),
        "/",
      ),
      scheme: v.optional(about("How it is asked", v.picklist(["http", "https"])), "http"),
      expected_status: v.optional(
        v.pipe(v.number(), v.integer(), v.minValue(100), v.maxValue(599), v.description("Of the answer")),
        200,
      ),
      expected_body: v.optional(
        v.pipe(
          v.string(),
          v.minLength(1),
          v.maxLength(1024),
          v.description("Has to be in the first 64 KiB of the body"),
        ),
      ),
      tls_verify: v.optional(v.pipe(v.boolean(), v.description("Whether an https certificate has to be valid")), true),
    }),
  )),
  tcp: v.optional(
    about("A connection, which is all that it takes", v.strictObject({ port: about("Of the instance", Port) })),
  ),
  exec: v.optional(about(
    "A command in the instance, which has to end with 0",
    v.strictObject({
      command: v.pipe(
        v.array(text()),
        v.minLength(1),
        v.check(([file]) => file !== "", "expected a program"),
        v.description("The program and its arguments"),
      ),
      working_dir: v.optional(about("Where it begins; the instance's own when absent", text())),
    }),
  )),
});
export type HealthCheck = v.InferOutput<typeof HealthCheck>;
type Kind = "http" | "tcp" | "exec";
type Timing =
  & Pick<
    HealthCheck,
    "interval" | "start_period" | "failure_threshold" | "success_threshold"
  >
  & { timeout: string };
/** As it is kept. */
export type Kept =
  | { type: "none" }
  | Timing & { [K in Kind]: { type: K } & Record<K, NonNullable<HealthCheck[K]>> }[Kind];
/** What is probed how, with times in milliseconds. */
export interface Check {
  readonly kept: Exclude<Kept, { type: "none" }>;
  readonly interval: number;
  readonly timeout: number;
  readonly startPeriod: number;
}

/** What this host can do for a check. */
export interface Means {
  /** Whether connections can be made to the instance. */
  reaches(instance: Instance): boolean;
  /** Undefined where there is no such driver. */
  executes(driver: string): boolean | undefined;
}

const KINDS: readonly Kind[] = ["http", "tcp", "exec"];
const TIMEOUT = 2_000;
const DEFAULTS = { failure_threshold: 3, success_threshold: 1 };

/** The policy as it is kept: with its defaults, durations in Go's spelling. @throws {DormouseError} `invalid_health_check` */
export function normalise(policy: HealthCheck, instance: Instance, means: Means): Kept {
  const given = KINDS.filter((kind) => policy[kind] !== undefined);
  if (policy.type === undefined && given.length > 1) {
    throw wrong("type", `missing, there is ${given.map((kind) => `"${kind}"`).join(" and ")}`);
  }
  const type = policy.type ?? given[0] ?? "none";
  if (type === "none") return { type };
  const other = given.find((kind) => kind !== type);
  if (other) throw wrong(other, `type is ${type}`);
  const interval = parseDuration(policy.interval)!;
  const timeout = policy.timeout === undefined ? Math.min(TIMEOUT, interval) : parseDuration(policy.timeout)!;
  if (timeout > interval) throw wrong("timeout", `${policy.timeout} is longer than the interval, ${policy.interval}`);
  if (type === "exec") {
    if (means.executes(instance.driver) === false) throw wrong(type, `driver "${instance.driver}" cannot execute`);
  } else if (!means.reaches(instance)) throw wrong(type, "the instance has no network");
  const timing: Timing = {
    interval: formatDuration(interval),
    timeout: formatDuration(timeout),
    start_period: formatDuration(parseDuration(policy.start_period)!),
    failure_threshold: policy.failure_threshold || DEFAULTS.failure_threshold,
    success_threshold: policy.success_threshold || DEFAULTS.success_threshold,
  };
  const { http, tcp, exec } = policy;
  if (type === "http" && http) return { type, ...timing, http };
  if (type === "tcp" && tcp) return { type, ...timing, tcp };
  if (type === "exec" && exec) return { type, ...timing, exec };
  throw wrong(type, `missing, type is ${type}`);
}

/** Whether a policy asks for anything. */
export function isOn(kept: Kept | undefined): kept is Check["kept"] {
  return kept !== undefined && kept.type !== "none";
}

/** What is to be done for a policy; undefined for none, and for one that is off. */
export function checkOf(kept: Kept | undefined): Check | undefined {
  if (!isOn(kept)) return undefined;
  const [interval, timeout, startPeriod] = [kept.interval, kept.timeout, kept.start_period].map((text) =>
    parseDuration(text)!
  );
  return { kept, interval, timeout, startPeriod };
}

function wrong(key: string, why: string): DormouseError {
  const field = `health_check.${key}`;
  return new DormouseError("invalid_health_check", `Wrong value of "${field}": ${why}`, { details: { field } });
}
