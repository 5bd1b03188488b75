import { Buffer } from "node:buffer";
import { closeSync, openSync } from "node:fs";
import { connect, type Socket } from "node:net";
import { basename, dirname } from "node:path";
import { abortable, deadline } from "../shared/async.ts";

/** The longest path of a socket that unix(7) takes, in bytes. */
const MAX_PATH = 107;

export interface DialOptions {
  signal?: AbortSignal;
  /** Milliseconds to be connected within; 5 s when absent. */
  timeout?: number;
}

/**
 * Connects to the socket of a program. Its path may be longer than the kernel takes one to be: then the way leads through
 * its folder, opened here.
 *
 * @throws {Error} `ENOENT`, `ECONNREFUSED` and the like; `ETIMEDOUT` where nobody accepts in time; the signal's reason
 */
export async function dial(path: string, { signal, timeout = 5_000 }: DialOptions = {}): Promise<Socket> {
  signal?.throwIfAborted();
  const folder = Buffer.byteLength(path) > MAX_PATH ? openSync(dirname(path), "r") : undefined;
  const reachable = folder === undefined ? path : `/proc/self/fd/${folder}/${basename(path)}`;
  const { promise, resolve, reject } = Promise.withResolvers<void>();
  const socket = connect(reachable, resolve);
  socket.once("error", reject);
  const late = () => reject(Object.assign(new Error(`Nobody accepts at "${path}"`), { code: "ETIMEDOUT" }));
  const timer = setTimeout(late, timeout);
  const abort = () => reject(signal!.reason);
  signal?.addEventListener("abort", abort);
  try {
    await promise;
    // What happens to it later is for the caller to see; an `error` that nobody listens to would end the process.
    return socket.on("error", () => {});
  } catch (error) {
    socket.on("error", () => {}).destroy();
    throw error;
  } finally {
    clearTimeout(timer);
    signal?.removeEventListener("abort", abort);
    if (folder !== undefined) closeSync(folder);
  }
}

/** Settles as `work` does, unless `timeout` milliseconds pass or the signal aborts before. @throws {DOMException} TimeoutError */
export function within<T>(work: Promise<T>, timeout: number, what: string, signal?: AbortSignal): Promise<T> {
  // In this order: an abort settles what the timer waits for, and frees it.
  return deadline(signal ? abortable(work, signal) : work, Math.max(Math.round(timeout), 1), what);
}

/** The other side is gone, or says what makes no sense. What was under way may have been done or not. */
export class ConnectionLost extends Error {
  override readonly name = "ConnectionLost";
}

const NEWLINE = 10;

/** Cuts a stream into lines. A line may be of at most `max` bytes, so that nobody can have us keep more than that. */
export class Lines {
  max: number;
  #parts: Buffer[] = [];
  #size = 0;

  constructor(max: number) {
    this.max = max;
  }

  /** The lines that are complete with this chunk. @throws {ConnectionLost} where one is too long */
  *push(chunk: Buffer): Generator<Buffer> {
    for (let rest = chunk; rest.length > 0;) {
      const end = rest.indexOf(NEWLINE);
      const part = end < 0 ? rest : rest.subarray(0, end);
      this.#size += part.length;
      if (this.#size > this.max) throw new ConnectionLost(`It sent a line of more than ${this.max} bytes`);
      this.#parts.push(part);
      if (end < 0) return;
      const line = Buffer.concat(this.#parts);
      this.clear();
      rest = rest.subarray(end + 1);
      yield line;
    }
  }

  clear(): void {
    this.#parts = [];
    this.#size = 0;
  }
}

/** A line as an object. @throws {ConnectionLost} where it is none */
export function parseObject(line: Buffer): Record<string, unknown> {
  try {
    const value: unknown = JSON.parse(line.toString("utf8"));
    if (typeof value === "object" && value !== null && !Array.isArray(value)) return value as Record<string, unknown>;
  } catch (error) {
    throw new ConnectionLost(`It sent what is no JSON: ${quote(line)}`, { cause: error });
  }
  throw new ConnectionLost(`It sent what is no object: ${quote(line)}`);
}

/** Characters of what the other side says of an error: it goes into logs and answers. */
export const MAX_REASON = 500;

/** `{ class, desc }` of an answer's `error`, the same in both protocols. */
export interface RemoteError {
  readonly class: string;
  readonly desc: string;
}

export function remoteError(value: unknown): RemoteError {
  const { class: name, desc } = (typeof value === "object" && value !== null ? value : {}) as Record<string, unknown>;
  return {
    class: typeof name === "string" ? name.slice(0, MAX_REASON) : "GenericError",
    desc: typeof desc === "string" ? desc.slice(0, MAX_REASON) : "no reason given",
  };
}

function quote(line: Buffer): string {
  return JSON.stringify(line.toString("latin1", 0, 80));
}
