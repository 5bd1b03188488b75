/** A client of the QEMU Machine Protocol, https://www.qemu.org/docs/master/interop/qmp-spec.html. */
import type { Buffer } from "node:buffer";
import type { Socket } from "node:net";
import { messageOf } from "../shared/errors.ts";
import { ConnectionLost, dial, Lines, parseObject, remoteError, within } from "./socket.ts";

export interface QmpEvent {
  /** `STOP`, `SHUTDOWN`, `GUEST_PANICKED` and the others of the reference. */
  readonly event: string;
  readonly data: Readonly<Record<string, unknown>>;
  /** Milliseconds since the epoch, by the clock of the machine that QEMU runs on. */
  readonly at: number;
}

export interface QmpOptions {
  signal?: AbortSignal;
  /** Milliseconds until it is greeted; 5 s when absent. QEMU greets one client at a time, the next waits for its end. */
  timeout?: number;
  /** Called with each event as it comes, the first ones included. It must not throw. */
  onEvent?: (event: QmpEvent) => void;
  /** Bytes that one line may have; 8 MiB when absent. */
  maxLine?: number;
}

export interface ExecuteOptions {
  signal?: AbortSignal;
  /** Milliseconds to wait for the answer; 10 s when absent. */
  timeout?: number;
}

/** QEMU's refusal of a command. */
export class QmpError extends Error {
  override readonly name = "QmpError";
  readonly command: string;
  /** `GenericError`, `CommandNotFound`, `DeviceNotFound` ... */
  readonly class: string;

  constructor(command: string, error: unknown) {
    const { class: name, desc } = remoteError(error);
    super(`QMP command "${command}" failed: ${desc}`);
    this.command = command;
    this.class = name;
  }
}

interface Pending {
  command: string;
  resolve(value: unknown): void;
  reject(error: Error): void;
}

/** A connection to the monitor of one QEMU. It ends with QEMU, on {@linkcode close}, and when what comes makes no sense. */
export class Qmp implements Disposable {
  /** Resolves when it has ended, with the reason; it never rejects. */
  readonly closed: Promise<ConnectionLost>;
  readonly #socket: Socket;
  readonly #lines: Lines;
  readonly #onEvent: (event: QmpEvent) => void;
  readonly #pending = new Map<number, Pending>();
  readonly #greeted = Promise.withResolvers<string>();
  readonly #ended = Promise.withResolvers<ConnectionLost>();
  #next = 1;
  #lost: ConnectionLost | undefined;
  #version = "";
  #agreed: Promise<unknown> = Promise.resolve();

  private constructor(socket: Socket, { onEvent = () => {}, maxLine = 8 * 1024 * 1024 }: QmpOptions) {
    this.#socket = socket;
    this.#lines = new Lines(maxLine);
    this.#onEvent = onEvent;
    this.closed = this.#ended.promise;
    this.#greeted.promise.catch(() => {}); // seen by who connects, unless that was given up before
    socket.on("data", (chunk) => this.#read(chunk as Buffer));
    socket.on("error", (error) => this.#end(error.message));
    socket.on("close", () => this.#end("QEMU closed it"));
  }

  /**
   * Connects to a monitor's socket, is greeted and agrees on the protocol.
   *
   * @throws {Error} `ENOENT`, `ECONNREFUSED` and the like; {@linkcode ConnectionLost}; `TimeoutError`; the signal's reason
   */
  static async connect(path: string, options: QmpOptions = {}): Promise<Qmp> {
    const { signal, timeout = 5_000 } = options;
    const end = performance.now() + timeout;
    const qmp = await Qmp.open(path, options);
    try {
      await within(qmp.#agreed, end - performance.now(), `Agreeing on the protocol at "${path}"`, signal);
      return qmp;
    } catch (error) {
      qmp.close();
      throw error;
    }
  }

  /**
   * As {@linkcode Qmp.connect}, but resolves when it is greeted: QEMU does that before it has made its machine, and takes
   * what it is to do then. The agreement is on its way before all of that; without one, QEMU refuses each command.
   */
  static async open(path: string, options: QmpOptions = {}): Promise<Qmp> {
    const { signal, timeout = 5_000 } = options;
    const end = performance.now() + timeout;
    const qmp = new Qmp(await dial(path, options), options);
    try {
      qmp.#version = await within(qmp.#greeted.promise, end - performance.now(), `The greeting at "${path}"`, signal);
      qmp.#agreed = qmp.execute("qmp_capabilities", {}, { timeout });
      qmp.#agreed.catch(() => {}); // seen by who connects
      return qmp;
    } catch (error) {
      qmp.close();
      throw error;
    }
  }

  /** As QEMU gives it: `7.2.22`. */
  get version(): string {
    return this.#version;
  }

  /**
   * Resolves to what the command returns. Where it rejects otherwise than with a {@linkcode QmpError}, nobody knows whether
   * the command has been, or will yet be, carried out.
   *
   * @throws {QmpError} where QEMU refuses it
   * @throws {ConnectionLost} where the connection ends, or has ended, before the answer
   * @throws {DOMException} `TimeoutError`; the connection stays, and the answer is dropped when it comes
   */
  async execute(
    command: string,
    args: Readonly<Record<string, unknown>> = {},
    { signal, timeout = 10_000 }: ExecuteOptions = {},
  ): Promise<unknown> {
    signal?.throwIfAborted();
    if (this.#lost) throw new ConnectionLost(`Cannot run QMP command "${command}": ${this.#lost.message}`);
    const id = this.#next++;
    const { promise, resolve, reject } = Promise.withResolvers<unknown>();
    this.#pending.set(id, { command, resolve, reject });
    this.#socket.write(`${JSON.stringify({ execute: command, arguments: args, id })}\n`);
    return await within(promise, timeout, `QMP command "${command}"`, signal);
  }

  /** Has QEMU end itself, and resolves once the connection has ended, which it may before the answer. */
  async quit(options: ExecuteOptions = {}): Promise<void> {
    const { signal, timeout = 10_000 } = options;
    const end = performance.now() + timeout;
    try {
      await this.execute("quit", {}, options);
    } catch (error) {
      if (!(error instanceof ConnectionLost)) throw error;
    }
    await within(this.closed, end - performance.now(), "The end of QEMU", signal);
  }

  /** Ends the connection; QEMU goes on. Twice is once. */
  close(): void {
    this.#end("it was closed here");
  }

  [Symbol.dispose](): void {
    this.close();
  }

  #read(chunk: Buffer): void {
    try {
      for (const line of this.#lines.push(chunk)) {
        if (this.#lost) return;
        this.#message(parseObject(line));
      }
    } catch (error) {
      // Whatever a QEMU can say, it does not end this process.
      this.#end(messageOf(error));
    }
  }

  #message(message: Record<string, unknown>): void {
    if (typeof message.event === "string") return this.#event(message.event, message);
    if ("QMP" in message) return this.#greeted.resolve(versionOf(message.QMP));
    const { id } = message;
    const pending = typeof id === "number" ? this.#pending.get(id) : undefined;
    // Each command's entry stays until its answer, late ones included, so this is one that nobody asked for.
    if (!pending) throw new ConnectionLost(`It answered what was not asked: ${JSON.stringify(message).slice(0, 200)}`);
    this.#pending.delete(id as number);
    if ("return" in message) pending.resolve(message.return);
    else pending.reject(new QmpError(pending.command, message.error));
  }

  #event(event: string, { data, timestamp }: Record<string, unknown>): void {
    const { seconds = 0, microseconds = 0 } = (timestamp ?? {}) as { seconds?: number; microseconds?: number };
    this.#onEvent({
      event,
      data: (data ?? {}) as Record<string, unknown>,
      at: seconds * 1000 + Math.floor(microseconds / 1000),
    });
  }

  #end(reason: string): void {
    if (this.#lost) return;
    this.#lost = new ConnectionLost(`The QMP connection has ended: ${reason}`);
    this.#socket.destroy();
    this.#greeted.reject(this.#lost);
    for (const { command, reject } of this.#pending.values()) {
      reject(new ConnectionLost(`QMP command "${command}" got no answer: ${reason}`));
    }
    this.#pending.clear();
    this.#ended.resolve(this.#lost);
  }
}

function versionOf(greeting: unknown): string {
  const { major, minor, micro } = (greeting as { version?: { qemu?: Record<string, number> } })?.version?.qemu ?? {};
  return [major, minor, micro].join(".");
}
