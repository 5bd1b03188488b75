/**
 * A client of the QEMU guest agent, https://www.qemu.org/docs/master/interop/qemu-ga-ref.html, through the socket of its
 * virtio-serial port. The guest is not trusted, and may be frozen, restored or gone between any two bytes.
 */
import { Buffer } from "node:buffer";
import { randomInt } from "node:crypto";
import type { Socket } from "node:net";
import { abortable, delay } from "../shared/async.ts";
import { messageOf } from "../shared/errors.ts";
import { ConnectionLost, dial, Lines, parseObject, remoteError, within } from "./socket.ts";

export interface CallOptions {
  signal?: AbortSignal;
  /** Aborts the wait for calls before it, and nothing once it is asked. */
  queued?: AbortSignal;
  /** Milliseconds for all of it, waiting for calls before it included; 5 s when absent. */
  timeout?: number;
  /** Bytes that the answer may have; 1 MiB when absent. */
  max?: number;
}

/** The agent's refusal of a command. */
export class AgentError extends Error {
  override readonly name = "AgentError";
  readonly command: string;
  readonly class: string;

  constructor(command: string, error: unknown) {
    const { class: name, desc } = remoteError(error);
    super(`Guest agent command "${command}" failed: ${desc}`);
    this.command = command;
    this.class = name;
  }
}

/** No bytes of JSON hold it: what comes before it belongs to questions that were given up. */
const SENTINEL = 0xff;
const MAX_LINE = 1024 * 1024;
/** Milliseconds between attempts to reach an agent that does not answer. */
const RETRY_MS = 250;

/**
 * The agent of one guest. It connects when it is first asked for something, and again after the connection was lost or
 * an answer did not come in time; each connection begins with a synchronisation, so that an answer that comes late is
 * never taken for that of a later question. Calls are made one after the other, as the agent takes them.
 */
export class Agent implements AsyncDisposable {
  readonly #path: string;
  #link: Link | undefined;
  /** Settles, and never rejects, when the last call so far is over. */
  #turn: Promise<void> = Promise.resolve();
  #closed = false;

  constructor(path: string) {
    this.#path = path;
  }

  /**
   * Resolves to what a command returns. Where it rejects otherwise than with an {@linkcode AgentError}, nobody knows
   * whether the command has been, or will yet be, carried out.
   *
   * @throws {AgentError} where the agent refuses it
   * @throws {ConnectionLost} where the connection ends before the answer, or the answer makes no sense
   * @throws {DOMException} `TimeoutError`
   * @throws {Error} `ENOENT`, `ECONNREFUSED` and the like; the signal's reason
   */
  async call(
    command: string,
    args: Readonly<Record<string, unknown>> = {},
    options: CallOptions = {},
  ): Promise<unknown> {
    const { signal, queued, timeout = 5_000, max = MAX_LINE } = options;
    const end = performance.now() + timeout;
    const what = `Guest agent command "${command}"`;
    return await this.#inTurn(end, what, signal ?? queued, async () => {
      const link = await this.#synchronised(end, what, signal ?? queued);
      queued?.throwIfAborted();
      const answer = link.ask(JSON.stringify({ execute: command, arguments: args }), max);
      const message = await this.#orDrop(link, within(answer, end - performance.now(), what, signal));
      if ("return" in message) return message.return;
      throw new AgentError(command, message.error);
    });
  }

  /** Sends what has no answer when it works; resolves where none comes within `grace` milliseconds. @throws as `call` */
  async send(
    command: string,
    args: Readonly<Record<string, unknown>>,
    grace: number,
    options: CallOptions = {},
  ): Promise<void> {
    const { signal, timeout = 5_000 } = options;
    const end = performance.now() + timeout;
    const what = `Guest agent command "${command}"`;
    await this.#inTurn(end, what, signal, async () => {
      const link = await this.#synchronised(end, what, signal);
      const refused = link.ask(JSON.stringify({ execute: command, arguments: args }), MAX_LINE);
      const late = AbortSignal.timeout(grace);
      try {
        const message = await abortable(refused, signal ? AbortSignal.any([signal, late]) : late);
        if ("error" in message) throw new AgentError(command, message.error);
      } catch (error) {
        // Nothing has come, or the guest is gone already: that is how it works.
        if (!(error instanceof ConnectionLost) && error !== late.reason) throw error;
      } finally {
        this.#drop(link);
      }
    });
  }

  /** Resolves once the agent has been found, at once where it was before. @throws as `call` */
  async synchronise({ signal, timeout = 5_000 }: CallOptions = {}): Promise<void> {
    const end = performance.now() + timeout;
    const what = "The guest agent's synchronisation";
    await this.#inTurn(end, what, signal, () => this.#synchronised(end, what, signal));
  }

  /** Resolves once the agent has answered. @throws as `call` */
  async ping(options: CallOptions = {}): Promise<void> {
    await this.call("guest-ping", {}, options);
  }

  /** Asks until the agent answers, for as long as the signal lets it. @throws the signal's reason */
  async ready({ signal, every = 5_000 }: { signal: AbortSignal; every?: number }): Promise<void> {
    for (;;) {
      try {
        return await this.ping({ signal, timeout: every });
      } catch (error) {
        // Not listening yet, started again, or restored under our hands: all of that is why this is called.
        if (signal.aborted || this.#closed) throw error;
        await delay(RETRY_MS, { signal });
      }
    }
  }

  /** Ends the connection; calls under way reject. */
  async [Symbol.asyncDispose](): Promise<void> {
    this.#closed = true;
    this.#link?.end("it was closed here");
    await this.#turn;
  }

  async #inTurn<T>(end: number, what: string, signal: AbortSignal | undefined, work: () => Promise<T>): Promise<T> {
    signal?.throwIfAborted();
    const before = this.#turn;
    const { promise, resolve } = Promise.withResolvers<void>();
    // Whoever gives up waiting still leaves its place to those behind it only once those before it are done.
    this.#turn = Promise.all([before, promise]).then(() => {});
    try {
      await within(before, end - performance.now(), what, signal);
      return await work();
    } finally {
      resolve();
    }
  }

  async #synchronised(end: number, what: string, signal?: AbortSignal): Promise<Link> {
    if (this.#closed) throw new ConnectionLost(`${what} was not sent: the connection was closed here`);
    if (this.#link && !this.#link.lost) return this.#link;
    const left = () => Math.max(end - performance.now(), 1);
    const link = new Link(await dial(this.#path, { timeout: left(), ...(signal && { signal }) }));
    if (this.#closed) link.end("it was closed here");
    this.#link = link;
    await this.#orDrop(link, within(link.synchronise(), left(), `Finding the guest agent for ${what}`, signal));
    return link;
  }

  /** An answer that was not waited for would be taken for the next one: such a connection is of no more use. */
  async #orDrop<T>(link: Link, work: Promise<T>): Promise<T> {
    try {
      return await work;
    } catch (error) {
      this.#drop(link);
      throw error;
    }
  }

  #drop(link: Link): void {
    link.end("it was given up here");
    if (this.#link === link) this.#link = undefined;
  }
}

/** One connection to the agent, with one question at a time. */
class Link {
  lost: ConnectionLost | undefined;
  readonly #socket: Socket;
  readonly #lines = new Lines(MAX_LINE);
  /** The question under way: what takes the answer, and the number of a synchronisation. */
  #asked: { resolve(message: Record<string, unknown>): void; reject(error: Error): void; sync?: number } | undefined;
  /** Whether everything up to the next sentinel is to be dropped. */
  #deaf = false;

  constructor(socket: Socket) {
    this.#socket = socket;
    socket.on("data", (chunk) => this.#read(chunk as Buffer));
    socket.on("error", (error) => this.end(error.message));
    socket.on("close", () => this.end("QEMU closed it"));
    if (socket.destroyed) this.end("QEMU closed it");
  }

  async synchronise(): Promise<void> {
    const id = randomInt(2 ** 31);
    this.#deaf = true;
    // The sentinel makes the agent forget what it has read of a question that was cut off.
    const text = JSON.stringify({ execute: "guest-sync-delimited", arguments: { id } });
    await this.#ask(Buffer.concat([Buffer.of(SENTINEL), Buffer.from(text)]), MAX_LINE, id);
  }

  ask(text: string, max: number): Promise<Record<string, unknown>> {
    return this.#ask(Buffer.from(text), max);
  }

  end(reason: string): void {
    if (this.lost) return;
    this.lost = new ConnectionLost(`The connection to the guest agent has ended: ${reason}`);
    this.#socket.destroy();
    this.#asked?.reject(this.lost);
    this.#asked = undefined;
  }

  #ask(bytes: Buffer, max: number, sync?: number): Promise<Record<string, unknown>> {
    if (this.lost) return Promise.reject(this.lost);
    const { promise, resolve, reject } = Promise.withResolvers<Record<string, unknown>>();
    this.#asked = { resolve, reject, ...(sync !== undefined && { sync }) };
    this.#lines.max = max;
    this.#socket.write(Buffer.concat([bytes, Buffer.from("\n")]));
    return promise;
  }

  #read(chunk: Buffer): void {
    let rest = chunk;
    try {
      for (;;) {
        if (this.lost) return;
        const sentinel = rest.indexOf(SENTINEL);
        // A sentinel begins an answer to a synchronisation: of the one under way, or one of before that was given up.
        if (sentinel < 0) return this.#deaf ? undefined : this.#readLines(rest);
        if (!this.#deaf) this.#readLines(rest.subarray(0, sentinel));
        this.#lines.clear();
        this.#deaf = false;
        rest = rest.subarray(sentinel + 1);
      }
    } catch (error) {
      // Whatever a guest can say, it does not end this process.
      this.end(messageOf(error));
    }
  }

  #readLines(bytes: Buffer): void {
    for (const line of this.#lines.push(bytes)) {
      const asked = this.#asked;
      if (!asked) throw new ConnectionLost("It answered what was not asked");
      const message = parseObject(line);
      if (asked.sync !== undefined && message.return !== asked.sync) {
        this.#deaf = true;
        return;
      }
      this.#asked = undefined;
      asked.resolve(message);
    }
  }
}
