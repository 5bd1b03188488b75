import { Buffer } from "node:buffer";
import { constants } from "node:os";
import { execa } from "execa";
import type { ExecRequest, ExecResult } from "../../main.ts";
import { delay } from "../shared/async.ts";
import { messageOf } from "../shared/errors.ts";
import { processStat, signalProcess } from "../shared/proc.ts";
import { searchPath } from "../shared/programs.ts";
import type { Command } from "./command.ts";
import { Session } from "./enclosure.ts";
import { JOIN } from "./shim.ts";

/** How long output may still come once the command has ended; what it left in the background may hold the pipe open. */
const DRAIN_MS = 200;

/** The first `max` bytes of a stream. */
class Head {
  readonly #max: number;
  readonly #parts: Buffer[] = [];
  #size = 0;
  truncated = false;

  constructor(max: number) {
    this.#max = max;
  }

  push = (bytes: Buffer): void => {
    const kept = bytes.subarray(0, this.#max - this.#size);
    this.truncated ||= kept.length < bytes.length;
    this.#size += kept.length;
    if (kept.length > 0) this.#parts.push(kept);
  };

  toString(): string {
    return Buffer.concat(this.#parts).toString("utf8");
  }
}

/** Execs under way, to be ended with their instance where no cgroup does that. */
export class Execs {
  readonly #running = new Map<string, Set<AbortController>>();

  /** {@linkcode execute} for an instance. */
  async run(id: string, command: Command, joins: readonly string[], request: ExecRequest): Promise<ExecResult> {
    const stop = new AbortController();
    const signal = request.signal ? AbortSignal.any([request.signal, stop.signal]) : stop.signal;
    const running = this.#running.get(id) ?? new Set();
    this.#running.set(id, running.add(stop));
    try {
      return await execute(command, joins, { ...request, signal });
    } finally {
      running.delete(stop);
      if (running.size === 0) this.#running.delete(id);
    }
  }

  end(id: string, reason: Error): void {
    for (const stop of this.#running.get(id) ?? []) stop.abort(reason);
  }
}

/**
 * Runs a command among the processes of an instance, with its output bounded. At the deadline its whole group is killed.
 * What it leaves behind in the background stays, as a part of the instance; where no cgroup makes it one, it is killed.
 *
 * @throws the signal's reason, after killing the group
 */
export async function execute(
  { argv, directory, env }: Command,
  joins: readonly string[],
  request: Pick<ExecRequest, "timeout_ms" | "max_output" | "signal">,
): Promise<ExecResult> {
  const { timeout_ms, max_output, signal } = request;
  signal?.throwIfAborted();
  const child = execa("/bin/sh", ["-c", JOIN, "dormouse-exec", directory, ...joins, "--", ...argv], {
    detached: true,
    stdin: "ignore",
    buffer: false,
    reject: false,
    extendEnv: false,
    env: { ...env, PATH: searchPath() },
  });
  const { pid, stdout, stderr } = child.nodeChildProcess;
  const leader = pid === undefined ? undefined : processStat(pid);
  const [out, err] = [new Head(max_output), new Head(max_output)];
  stdout!.on("data", out.push);
  stderr!.on("data", err.push);
  const refused = Promise.withResolvers<never>();
  refused.promise.catch(() => {}); // seen below, unless it ended first
  const ended = new Promise<number>((resolve, reject) => {
    child.nodeChildProcess.once("error", reject);
    child.nodeChildProcess.once("exit", (code, name) => resolve(code ?? 128 + (constants.signals[name!])));
  });
  let timed_out = false;
  // The group's leader is our child and not waited for before its exit is seen, so the number cannot be another's.
  const killGroup = () => {
    try {
      signalProcess(-pid!, "SIGKILL");
    } catch (error) {
      // It has become somebody else, whom this host may not end: whoever waits for it has waited long enough.
      refused.reject(new Error(`the command may not be ended by this host: ${messageOf(error)}`, { cause: error }));
    }
  };
  const timer = setTimeout(() => {
    timed_out = true;
    killGroup();
  }, timeout_ms);
  signal?.addEventListener("abort", killGroup, { once: true });
  let failed = false;
  try {
    const exit_code = await Promise.race([ended, refused.promise]);
    clearTimeout(timer);
    signal?.throwIfAborted();
    const drained = new AbortController();
    await Promise.race([child, delay(DRAIN_MS, { signal: drained.signal })]);
    drained.abort();
    const truncated = out.truncated || err.truncated;
    return { exit_code, stdout: out.toString(), stderr: err.toString(), timed_out, truncated };
  } catch (error) {
    failed = true;
    throw error;
  } finally {
    clearTimeout(timer);
    signal?.removeEventListener("abort", killGroup);
    stdout!.destroy();
    stderr!.destroy();
    // What this fails for is no news where the command has failed for it.
    const left = joins.length === 0 && leader ? new Session(leader).kill() : undefined;
    await left?.catch((error) => {
      if (!failed) throw error;
    });
  }
}
