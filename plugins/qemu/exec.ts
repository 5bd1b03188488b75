import { Buffer } from "node:buffer";
import * as v from "valibot";
import { DormouseError, type ExecRequest, type ExecResult } from "../../main.ts";
import { abortable, delay } from "../shared/async.ts";
import { messageOf } from "../shared/errors.ts";
import { type Agent, AgentError } from "./agent.ts";
import { ConnectionLost } from "./socket.ts";

export interface GuestExecRequest extends ExecRequest {
  /** For its stdin, which is empty without it. */
  input?: string | Uint8Array;
  /** Runs it as the agent does, for what needs no folder and starts nothing that could outlive it: it is sooner done. */
  plain?: boolean;
}

/**
 * What the agent is asked to run: it knows no working directory, and kills nothing. In a session of its own the command can
 * be killed with all that it has started; a guest without `setsid` has to do with the command alone.
 */
const WRAPPER = `
cd "$1" || exit 126
shift
command -v setsid >/dev/null 2>&1 && exec setsid "$@"
exec "$@"
`;
const KILL = `kill -s KILL -- "-$1" 2>/dev/null || kill -s KILL "$1"`;
/** Of commands that come with an environment; without one they have the agent's. */
const PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/** The agent keeps up to 16 MiB of each stream and sends them in base64 once the command has ended. */
const MAX_ANSWER = 48 * 1024 * 1024;
/** Milliseconds between two questions whether it has ended: the first, and the longest. */
const [FIRST_MS, LONGEST_MS] = [5, 250];
/** Milliseconds that the agent may take for one answer, whatever is in it, and that a killed command may take to be gone. */
const [ANSWER_MS, KILL_MS] = [60_000, 10_000];

const Whole = v.pipe(v.number(), v.integer());
const Started = v.object({ pid: Whole });
const Status = v.object({
  exited: v.boolean(),
  exitcode: v.optional(Whole),
  signal: v.optional(Whole),
  "out-data": v.optional(v.string()),
  "err-data": v.optional(v.string()),
  "out-truncated": v.optional(v.boolean()),
  "err-truncated": v.optional(v.boolean()),
});
type Status = v.InferOutput<typeof Status>;

/**
 * Runs a command in the guest, as the agent's user. At its deadline it is killed; then the result has what it had printed,
 * and code 137. What it leaves in the background with its output open keeps it from ending.
 *
 * @throws as {@linkcode Agent.call}; where the connection is lost, the command may go on
 * @throws the signal's reason, after killing it; where it is not known yet to have begun, at once, and it is killed then
 */
export async function execute(agent: Agent, request: GuestExecRequest): Promise<ExecResult> {
  const { timeout_ms, max_output, signal } = request;
  const end = performance.now() + timeout_ms;
  const pid = await begun(agent, request);
  let status: Status;
  try {
    for (let pause = FIRST_MS; !(status = await statusOf(agent, pid, signal)).exited; pause *= 1.5) {
      const left = end - performance.now();
      if (left <= 0) break;
      await delay(Math.min(pause, LONGEST_MS, left), signal && { signal });
    }
  } catch (error) {
    // Where the guest does not answer there is nothing to kill in it, or no way to.
    if (signal?.aborted) await kill(agent, pid).catch(() => {});
    throw error;
  }
  const timed_out = !status.exited;
  if (timed_out) status = await kill(agent, pid);
  const [stdout, stderr] = [head(status["out-data"], max_output), head(status["err-data"], max_output)];
  return {
    exit_code: timed_out ? 137 : status.exitcode ?? 128 + (status.signal ?? 0),
    stdout: stdout.text,
    stderr: stderr.text,
    timed_out,
    truncated: [stdout.cut, stderr.cut, status["out-truncated"], status["err-truncated"]].includes(true),
  };
}

/**
 * Its pid. Who leaves before that is known leaves nothing behind, unless the guest does not answer.
 *
 * @throws {DormouseError} `invalid_request` where it is more than a program can be given
 */
async function begun(agent: Agent, request: GuestExecRequest): Promise<number> {
  const { signal } = request;
  signal?.throwIfAborted();
  const starting = start(agent, request);
  if (!signal) return await starting;
  try {
    return await abortable(starting, signal);
  } catch (error) {
    if (signal.aborted) starting.then((pid) => kill(agent, pid)).catch(() => {});
    throw error;
  }
}

/** What a guest or its agent fails in, told as such. @throws {DormouseError} `driver_failed`; the signal's reason */
export async function orFailed<T>(work: Promise<T>, what: string, signal?: AbortSignal): Promise<T> {
  try {
    return await work;
  } catch (error) {
    if (signal?.aborted || error instanceof DormouseError) throw error;
    throw new DormouseError("driver_failed", `Cannot ${what}: ${messageOf(error)}`, { cause: error });
  }
}

async function start(agent: Agent, request: GuestExecRequest): Promise<number> {
  const { command, working_dir = "/", env, input, timeout_ms, signal } = request;
  const wrapped = ["/bin/sh", "-c", WRAPPER, "dormouse-exec", working_dir, ...command];
  const [path, ...arg] = request.plain ? command : wrapped;
  const variables = Object.entries({ PATH, ...env }).map(([name, value]) => `${name}=${value}`);
  const started = await agent.call("guest-exec", {
    path,
    arg,
    "capture-output": true,
    ...(env && { env: variables }),
    ...(input !== undefined && { "input-data": Buffer.from(input).toString("base64") }),
  }, { timeout: Math.min(timeout_ms, ANSWER_MS), ...(signal && { queued: signal }) }).catch((error) => {
    if (!(error instanceof AgentError) || !/Argument list too long/.test(error.message)) throw error;
    const message = `Wrong value of "command": with "env" it is longer than what the guest's kernel takes`;
    throw new DormouseError("invalid_request", message, { cause: error });
  });
  return understood(Started, started).pid;
}

/** A guest may answer anything. @throws {ConnectionLost} where it is not what was asked for */
function understood<const T extends v.GenericSchema>(schema: T, answer: unknown): v.InferOutput<T> {
  const { success, output, issues } = v.safeParse(schema, answer);
  if (success) return output;
  throw new ConnectionLost(`The guest agent answered what makes no sense: ${issues[0].message}`);
}

async function statusOf(agent: Agent, pid: number, signal?: AbortSignal): Promise<Status> {
  const options = { timeout: ANSWER_MS, max: MAX_ANSWER, ...(signal && { signal }) };
  return understood(Status, await agent.call("guest-exec-status", { pid }, options));
}

/** Kills a command that ran a moment ago; resolves to what is known of it then. The agent forgets those that it told have exited. */
async function kill(agent: Agent, pid: number): Promise<Status> {
  const killer = await agent.call("guest-exec", { path: "/bin/sh", arg: ["-c", KILL, "sh", String(pid)] });
  const waiting = new Set([understood(Started, killer).pid, pid]);
  const end = performance.now() + KILL_MS;
  let status: Status = { exited: false };
  for (let pause = FIRST_MS; waiting.size > 0 && performance.now() < end; pause = Math.min(pause * 1.5, LONGEST_MS)) {
    for (const each of waiting) {
      const seen = await statusOf(agent, each).catch(forgotten);
      if (seen.exited) waiting.delete(each);
      if (each === pid) status = seen;
    }
    if (waiting.size > 0) await delay(pause);
  }
  return status;
}

/** Its end was told to a question whose answer nobody waited for. */
function forgotten(error: unknown): Status {
  if (error instanceof AgentError) return { exited: true };
  throw error;
}

function head(base64: string | undefined, max: number): { text: string; cut: boolean } {
  const bytes = Buffer.from(base64 ?? "", "base64");
  return { text: bytes.toString("utf8", 0, max), cut: bytes.length > max };
}
