import * as v from "valibot";
import { STATES } from "../../main.ts";
import { parseDuration } from "../shared/duration.ts";
import { about, text } from "../shared/schemas.ts";

/** Milliseconds. */
export const WAIT_AT_MOST = 300_000;
export const EXEC_AT_MOST = 3_600_000;

const Text = text();
const Words = v.array(Text);
const Duration = v.pipe(
  v.string(),
  v.check((text) => (parseDuration(text) ?? 0) > 0, 'expected a duration above zero such as "30s"'),
);
/** A query is text: these are shown in the document as the boolean and the number that they stand for. */
const Flag = v.picklist(["true", "false"]);
const Count = v.pipe(v.string(), v.regex(/^\d+$/, "expected a whole number"));

export const StartBody = v.pipe(
  v.object({
    entrypoint: v.optional(about("In the place of the instance's own, and kept", Words)),
    cmd: v.optional(about("In the place of the instance's own, and kept", Words)),
  }),
  v.metadata({ ref: "StartInstanceRequest" }),
);

export const StandbyBody = v.pipe(
  v.object({
    compression: v.optional(v.pipe(
      v.strictObject({
        enabled: about("Whether its memory is compressed", v.boolean()),
        algorithm: v.optional(about("zstd when absent", v.picklist(["zstd", "lz4"]))),
        level: v.optional(
          v.pipe(
            v.number(),
            v.integer(),
            v.description("1 to 19 for zstd, by default 1; 0 to 9 for lz4, by default 0"),
          ),
        ),
      }),
      v.description("For this standby, in the place of that of the snapshot_policy"),
    )),
    compression_delay: v.optional(v.pipe(
      v.string(),
      v.check((text) => (parseDuration(text) ?? -1) >= 0, 'expected a duration such as "30s"'),
      v.description("For this standby, in the place of the standby_compression_delay of the snapshot_policy"),
    )),
  }),
  v.metadata({ ref: "StandbyInstanceRequest" }),
);

export const WaitQuery = v.object({
  state: about("What is waited for", v.picklist(STATES.filter((state) => state !== "Unknown"))),
  timeout: v.optional(v.pipe(Duration, v.description("60s when absent, 5m at most"))),
});
export const WaitAnswer = v.pipe(
  v.object({ state: v.picklist(STATES), state_error: v.nullable(v.string()), timed_out: v.boolean() }),
  v.metadata({ ref: "WaitForStateResponse" }),
);

export const LogsQuery = v.object({
  tail: v.optional(
    v.pipe(
      Count,
      v.check((text) => Number(text) <= 100_000, "expected 100000 at most"),
      v.description("100 when absent"),
    ),
  ),
  follow: v.optional(about("Whether lines go on to be sent as they are written", Flag)),
  source: v.optional(
    about(
      "app, when absent too: the program's output; vmm: that of a machine's QEMU; hypeman: of the contract, and not there",
      v.picklist(["app", "vmm", "hypeman"]),
    ),
  ),
});

export const LogLine = v.pipe(v.string(), v.description('Events "data: <JSON string>", one a line of the log'));

export const StatsAnswer = v.pipe(
  v.object({
    instance_id: v.string(),
    instance_name: v.string(),
    cpu_seconds: v.number(),
    memory_rss_bytes: v.number(),
    memory_vms_bytes: v.number(),
    network_rx_bytes: v.number(),
    network_tx_bytes: v.number(),
    allocated_vcpus: v.number(),
    allocated_memory_bytes: v.number(),
    memory_utilization_ratio: v.nullable(v.number()),
  }),
  v.metadata({ ref: "InstanceStats" }),
);

export const StatQuery = v.object({
  path: v.pipe(
    Text,
    v.minLength(1, "expected a path"),
    v.maxLength(4096, "expected 4096 characters at most"),
    v.description("In the instance"),
  ),
  follow_links: v.optional(about("Whether what a symbolic link leads to is looked at", Flag)),
});
export const StatAnswer = v.pipe(
  v.object({
    exists: v.boolean(),
    is_dir: v.boolean(),
    is_file: v.boolean(),
    is_symlink: v.boolean(),
    link_target: v.nullable(v.string()),
    mode: v.number(),
    size: v.number(),
  }),
  v.metadata({ ref: "PathInfo" }),
);

export const ExecBody = v.pipe(
  v.object({
    command: v.pipe(Words, v.minLength(1, "expected a command"), v.description("The program and its arguments")),
    working_dir: v.optional(about("Where it begins; the instance's own when absent", Text)),
    env: v.optional(about(
      "Besides the instance's own, and before it",
      v.record(v.pipe(v.string(), v.regex(/^[^=\0]+$/, "expected a name without = or NUL")), Text),
    )),
    timeout: v.optional(
      v.pipe(
        Duration,
        v.check((text) => parseDuration(text)! <= EXEC_AT_MOST, "expected 1h at most"),
        v.description("60s when absent, 1h at most"),
      ),
    ),
  }),
  v.metadata({ ref: "ExecRequest" }),
);
export const ExecAnswer = v.pipe(
  v.object({
    exit_code: v.number(),
    stdout: v.string(),
    stderr: v.string(),
    timed_out: v.boolean(),
    truncated: v.boolean(),
  }),
  v.metadata({ ref: "ExecResponse" }),
);
