import * as v from "valibot";
import type { Note } from "../../main.ts";
import { type Kind, KINDS } from "./notes.ts";

/** Of some values: how many, their sum, and the rest as it reads. */
interface Tally {
  readonly count: number;
  readonly sum: number;
  readonly last: number;
  readonly min: number;
  readonly max: number;
}

/** What has been counted of one instance, up to the note `seq`. */
export interface Counts {
  readonly seq: number;
  readonly starts: number;
  readonly start_failures: number;
  readonly stops: number;
  readonly stop_failures: number;
  readonly latency: Tally | null;
  readonly idle: Tally | null;
  readonly last: { readonly type: string; readonly at: number } | null;
}

/** What counting needs of a note; rows of the journal have it too. */
export type Countable = Pick<Note, "seq" | "type" | "at" | "detail">;

const NOTHING: Counts = {
  seq: 0,
  starts: 0,
  start_failures: 0,
  stops: 0,
  stop_failures: 0,
  latency: null,
  idle: null,
  last: null,
};

const COUNTERS = {
  lazy_start: "starts",
  lazy_start_failed: "start_failures",
  lazy_stop: "stops",
  lazy_stop_failed: "stop_failures",
} satisfies Record<Kind, keyof Counts>;

export function isKind(type: string): type is Kind {
  return Object.hasOwn(KINDS, type);
}

/** With the note counted, once however often it comes. */
export function counted(counts: Counts = NOTHING, { seq, type, at, detail }: Countable): Counts {
  if (seq <= counts.seq || !isKind(type)) return counts;
  const counter = COUNTERS[type];
  return {
    ...counts,
    seq,
    [counter]: counts[counter] + 1,
    latency: type === "lazy_start" ? added(counts.latency, detail.latency_ms) : counts.latency,
    idle: type === "lazy_stop" ? added(counts.idle, detail.idle_seconds) : counts.idle,
    // Those of before may be read after those of now.
    last: counts.last && counts.last.at > at ? counts.last : { type, at },
  };
}

function added(tally: Tally | null, value: unknown): Tally | null {
  if (typeof value !== "number") return tally;
  if (!tally) return { count: 1, sum: value, last: value, min: value, max: value };
  const { count, sum, min, max } = tally;
  return { count: count + 1, sum: sum + value, last: value, min: Math.min(min, value), max: Math.max(max, value) };
}

const Count = v.pipe(v.number(), v.integer());
const Statistics = (unit: string) =>
  v.pipe(
    v.object({
      last: v.nullable(v.number()),
      mean: v.nullable(v.number()),
      min: v.nullable(v.number()),
      max: v.nullable(v.number()),
      count: Count,
    }),
    v.description(unit),
  );

/** The field `lifecycle_metrics` of lazy instances. */
export const Metrics = v.pipe(
  v.object({
    starts: v.pipe(Count, v.description("Acquires that started or restored it")),
    start_failures: Count,
    stops: v.pipe(Count, v.description("Stops and standbys after the idle window")),
    stop_failures: Count,
    leases_granted: Count,
    start_latency_ms: Statistics("Milliseconds from the acquire until it was ready"),
    idle_seconds: Statistics("Seconds without a lease before each stop"),
    last_event: v.nullable(
      v.object({ type: v.picklist(Object.keys(KINDS) as Kind[]), ts: v.pipe(v.string(), v.isoTimestamp()) }),
    ),
  }),
  v.metadata({ ref: "LifecycleMetrics" }),
);

/** The counts as they are shown. */
export function metricsOf(counts: Counts = NOTHING, leases_granted: number): Record<string, unknown> {
  const { starts, start_failures, stops, stop_failures, latency, idle, last } = counts;
  return {
    starts,
    start_failures,
    stops,
    stop_failures,
    leases_granted,
    start_latency_ms: statistics(latency),
    idle_seconds: statistics(idle),
    last_event: last && { type: last.type, ts: new Date(last.at).toISOString() },
  };
}

function statistics(tally: Tally | null) {
  if (!tally) return { last: null, mean: null, min: null, max: null, count: 0 };
  const { count, sum, last, min, max } = tally;
  return { last, mean: sum / count, min, max, count };
}
