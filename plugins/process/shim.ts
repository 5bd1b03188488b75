import { existsSync, readFileSync, statSync } from "node:fs";
import { execa } from "execa";
import { abortable, deadline } from "../shared/async.ts";
import { searchPath } from "../shared/programs.ts";
import type { Command } from "./command.ts";
import type { Launch, Records } from "./launch.ts";

/** Far beyond what two shells need to start, even on a machine that is out of breath. */
const START_TIMEOUT_MS = 30_000;

/**
 * Stays with the program to the end, outliving the host, and writes how it ended. Nothing of the user's is shell text:
 * every value is an argument. What the program left behind in its cgroup dies with it, before its end is told. Its own
 * cgroup it joins on the side, as the kernel may take its time over that.
 */
const SHIM = `
generation=$1 run=$2 log=$3 exits=$4 shims=$5 cgroup=$6 workload=$7 setsid=$8
shift 8
[ -z "$shims" ] || echo $$ >"$shims/cgroup.procs" &
exec 3>&1 1>/dev/null 2>"$run/$generation.err"
(exec "$setsid" /bin/sh -c "$workload" dormouse-workload "$generation" "$run" "$@" </dev/null >>"$log" 2>&1)
code=$?
exec 3>&-
signalled=0
[ ! -s "$run/$generation.err" ] || signalled=1
[ -s "$run/$generation.pid" ] || exit 0
[ -z "$cgroup" ] || echo 1 >"$cgroup/cgroup.kill"
echo "$code $signalled" >"$run/exit" && mv "$run/exit" "$exits"
`;

/**
 * The process that becomes the program. It joins the cgroups, writes who it is, and takes up the launch by a link that
 * fails where the host has withdrawn it. From then on it is known to every host that looks.
 */
const WORKLOAD = `
generation=$1 run=$2 directory=$3
shift 3
while [ "$1" != -- ]; do echo 0 >"$1" || exit 126; shift; done
shift
read -r x x x x x x x x x x x x x x x x x x x x x started x <"/proc/$$/stat"
read -r x x x x x x x x x x x x x x x x x x x x x shim x <"/proc/$PPID/stat"
read -r boot </proc/sys/kernel/random/boot_id
echo "$$ $started $PPID $shim $boot" >"$run/$generation.tmp" || exit 126
ln "$run/$generation.tmp" "$run/$generation.pid" 2>/dev/null || exit 126
read -r newest <"$run/launch"
[ "$newest" = "$generation" ] || { rm -f "$run/$generation.pid"; exit 126; }
cd -- "$directory" || exit 126
exec "$@"
`;

/** Joins the cgroups of an instance that runs, and becomes the command. Nobody waits to be told that it did. */
export const JOIN = `
exec 3>/dev/null
directory=$1
shift
while [ "$1" != -- ]; do echo 0 >"$1" || exit 126; shift; done
shift
cd -- "$directory" || exit 126
exec "$@"
`;

export interface ShimOptions {
  records: Records;
  launch: Launch;
  /** The cgroup that the shim itself goes to. */
  shims: string | null;
  /** What the workload joins. */
  joins: readonly string[];
  command: Command;
  setsid: string;
  signal: AbortSignal;
}

/**
 * Starts the shim and resolves once the program is known on disk, in its place, and about to begin.
 *
 * @throws the signal's reason, a `TimeoutError`, or an error where the shim ended first, with what that left in the log;
 * then nothing says yet whether the program begins, see {@linkcode Records.supersede}
 */
export async function startShim(options: ShimOptions): Promise<void> {
  const { records, launch, shims, joins, command, setsid, signal } = options;
  const cgroup = launch.cgroups[0] ?? "";
  const logged = statSync(records.log, { throwIfNoEntry: false })?.size ?? 0;
  const fixed = [launch.generation, records.run, records.log, records.exitFile(launch.generation), shims ?? "", cgroup];
  const shim = execa(
    "/bin/sh",
    ["-c", SHIM, "dormouse-shim", ...fixed, WORKLOAD, setsid, command.directory, ...joins, "--", ...command.argv],
    {
      // In a session of its own and not killed with the host, which it is there to outlive.
      detached: true,
      cleanup: false,
      stdin: "ignore",
      stdout: "pipe",
      stderr: "ignore",
      buffer: false,
      reject: false,
      extendEnv: false,
      env: { ...command.env, PATH: searchPath() },
    },
  );
  const output = shim.nodeChildProcess.stdout!;
  const told = new Promise<void>((resolve, reject) => {
    output.once("data", () => resolve());
    output.once("close", () => reject(new Error(`the program could not begin: ${tailOf(records.log, logged)}`)));
  });
  try {
    await abortable(deadline(told, START_TIMEOUT_MS, "starting the program"), signal);
  } finally {
    told.catch(() => undefined);
    output.destroy();
    shim.nodeChildProcess.unref();
  }
}

/** The last line that was written to the log since it had that size. */
function tailOf(log: string, size: number): string {
  if (!existsSync(log)) return "nothing was logged";
  return readFileSync(log).subarray(size).toString("utf8").trim().split("\n").at(-1) || "nothing was logged";
}
