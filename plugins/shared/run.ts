import { execa, ExecaError } from "execa";

export interface RunOptions {
  /** Text for its stdin; without it, stdin is empty. */
  input?: string;
  /** Kills it, and rejects. */
  signal?: AbortSignal;
  /** Milliseconds until it is killed; 30 s when absent. */
  timeout?: number;
  /** Added to this process's own environment. */
  env?: Record<string, string>;
  cwd?: string;
}

/** A command that could not be started, did not end with 0, or was killed; the message tells all that is known. */
export class CommandError extends Error {
  override readonly name = "CommandError";
  readonly command: string;
  /** Null where it was not started or ended by a signal. */
  readonly exitCode: number | null;
  /** `ENOENT` and the like where it was not started. */
  readonly code: string | undefined;
  readonly stderr: string;

  /** `stderr` where it is to be told other than `cause` has it. */
  constructor(command: string, cause: ExecaError, stderr = typeof cause.stderr === "string" ? cause.stderr : "") {
    super(`Command "${command}" failed: ${[describe(cause), stderr].filter(Boolean).join(": ")}`, { cause });
    this.command = command;
    this.exitCode = cause.exitCode ?? null;
    this.code = cause.code;
    this.stderr = stderr;
  }
}

/**
 * Runs a command to its end and returns its stdout without the last newline. No shell is involved.
 *
 * @throws {CommandError} unless it ends with 0
 */
export async function run(file: string, args: readonly string[] = [], options: RunOptions = {}): Promise<string> {
  const { input, signal, timeout = 30_000, env, cwd } = options;
  try {
    const { stdout } = await execa(file, args, {
      ...(input === undefined ? { stdin: "ignore" as const } : { input }),
      ...(signal && { cancelSignal: signal }),
      ...(cwd && { cwd }),
      timeout,
      // Messages are told to people and matched by tests: in one language.
      env: { ...env, LC_ALL: "C" },
    });
    return stdout as string;
  } catch (error) {
    if (error instanceof ExecaError) throw new CommandError([file, ...args].join(" "), error);
    throw error;
  }
}

function describe({ code, exitCode, signal, timedOut, isCanceled, originalMessage }: ExecaError): string {
  if (timedOut) return "it ran past its deadline";
  if (isCanceled) return "it was aborted";
  if (exitCode !== undefined) return `exit code ${exitCode}`;
  if (signal !== undefined) return `ended by ${signal}`;
  if (code === "ENOENT" && originalMessage?.startsWith("spawn ")) return "no such program";
  return originalMessage ?? "it could not be started";
}
