import * as v from "valibot";
import { DormouseError, type Instance } from "../../main.ts";
import { formatDuration, parseDuration } from "../shared/duration.ts";
import { about } from "../shared/schemas.ts";
import type { Compression } from "./compress.ts";
import { MACHINES } from "./machine.ts";

/** Levels of each algorithm, and the one that is meant where none is given: the contract's. */
const LEVELS = { zstd: { min: 1, max: 19, usual: 1 }, lz4: { min: 0, max: 9, usual: 0 } } as const;

const Level = v.pipe(
  v.number(),
  v.integer(),
  v.description("1 to 19 for zstd, by default 1; 0 to 9 for lz4, by default 0"),
);

/** How the memory of a machine that sleeps is compressed. */
export const CompressionPolicy = v.strictObject({
  enabled: about("Whether it is", v.boolean()),
  algorithm: v.optional(v.pipe(v.picklist(["zstd", "lz4"]), v.description("zstd when absent"))),
  level: v.optional(Level),
});
export type CompressionPolicy = v.InferOutput<typeof CompressionPolicy>;

/** The field `snapshot_policy` of create and update bodies. */
export const SnapshotPolicy = v.strictObject({
  compression: v.optional(about("Of the memory of a machine that sleeps", CompressionPolicy)),
  standby_compression_delay: v.optional(v.pipe(
    v.string(),
    v.check((text) => (parseDuration(text) ?? -1) >= 0, 'expected a duration such as "30s"'),
    v.description("From the standby until its memory is compressed; at once when absent"),
  )),
});
export type SnapshotPolicy = v.InferOutput<typeof SnapshotPolicy>;

/** What a machine that sleeps has to expect. */
export interface CompressionPlan extends Compression {
  /** Milliseconds from its standby. */
  readonly delay: number;
}

/** What there is to compress with: why not, by algorithm, or null. */
export type Means = Readonly<Record<Compression["algorithm"], string | null>>;

/**
 * The policy as it is kept: the algorithm and its level there where it compresses, the duration in Go's spelling.
 *
 * @throws {DormouseError} `invalid_snapshot_policy` where the level is not one of the algorithm's, `means` lack it, or the
 *   driver keeps no memory in a file
 */
export function normalise(policy: SnapshotPolicy, { driver }: Pick<Instance, "driver">, means: Means): SnapshotPolicy {
  const { compression, standby_compression_delay } = policy;
  if (compression?.enabled && !Object.hasOwn(MACHINES, driver)) {
    throw wrong("enabled", `driver "${driver}" has no file of the memory that could be compressed`);
  }
  return {
    ...(compression && { compression: checked(compression, means) }),
    ...(standby_compression_delay !== undefined && {
      standby_compression_delay: formatDuration(parseDuration(standby_compression_delay)!),
    }),
  };
}

/** What the policy of an instance asks for, as it is kept; null where nothing is to be compressed. */
export function planOf({ policies }: Pick<Instance, "policies">): CompressionPlan | null {
  const { compression, standby_compression_delay } = (policies.snapshot_policy ?? {}) as SnapshotPolicy;
  if (!compression?.enabled) return null;
  const { algorithm = "zstd", level = LEVELS[algorithm].usual } = compression;
  return { algorithm, level, delay: parseDuration(standby_compression_delay ?? "0s")! };
}

function checked(compression: CompressionPolicy, means: Means): CompressionPolicy {
  const { enabled, algorithm = "zstd" } = compression;
  // The contract has the rest ignored.
  if (!enabled) return { enabled };
  const { min, max, usual } = LEVELS[algorithm];
  const { level = usual } = compression;
  if (level < min || level > max) throw wrong("level", `expected ${min} to ${max} for ${algorithm}, found ${level}`);
  if (means[algorithm] !== null) throw wrong("algorithm", `${algorithm} cannot be used here: ${means[algorithm]}`);
  return { enabled, algorithm, level };
}

function wrong(key: keyof CompressionPolicy, what: string): DormouseError {
  const field = `snapshot_policy.compression.${key}`;
  return new DormouseError("invalid_snapshot_policy", `Wrong value of "${field}": ${what}`, { details: { field } });
}
