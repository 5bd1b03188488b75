import { once } from "node:events";
import { createServer, type Server, type Socket } from "node:net";
import type { Logger } from "@logtape/logtape";
import { DormouseError } from "../../main.ts";
import { messageOf } from "../shared/errors.ts";

/** Bytes of a held connection that wait in this process; what comes after them waits in the kernel. */
const HIGH_WATER = 16_384;
/** Milliseconds between attempts to bind what somebody else had at the start. */
const RETRY_MS = 5_000;
/** Milliseconds that a port stays bound for an instance that is being made. */
const RESERVED_MS = 30_000;
const SWEEP_MS = 1_000;

export interface ListenersOptions {
  /** Addresses; `::` is all of them, IPv4 and IPv6. */
  bind: readonly string[];
  log: Logger;
  /** Whether an instance has the port. */
  claimed(port: number): boolean;
  accept(socket: Socket, port: number): void;
}

/** The listeners of host ports, bound as long as an instance has the port, awake or not. */
export class Listeners implements AsyncDisposable {
  readonly #options: ListenersOptions;
  readonly #open = new Map<number, Promise<Server[]>>();
  /** Ports that are kept for instances which are being made, with the time until when. */
  readonly #reserved = new Map<number, number>();
  readonly #retries = new Map<number, ReturnType<typeof setTimeout>>();
  #sweeping: ReturnType<typeof setTimeout> | undefined;
  #closed = false;

  constructor(options: ListenersOptions) {
    this.#options = options;
  }

  /**
   * Binds a port that no instance has yet; it is freed again unless one has it soon.
   *
   * @throws {DormouseError} `port_conflict` where another program has it, or the kernel lets us not
   */
  async reserve(port: number): Promise<void> {
    this.#reserved.set(port, performance.now() + RESERVED_MS);
    await this.#bind(port);
    this.sweep();
  }

  /** Binds a port that an instance has, sooner or later. */
  open(port: number): void {
    this.#reserved.delete(port);
    if (this.#open.has(port) || this.#retries.has(port) || this.#closed) return;
    this.#bind(port).catch((error) => {
      const { log, claimed } = this.#options;
      log.error("{reason}; trying again until it can", { reason: messageOf(error), error });
      const again = () => {
        this.#retries.delete(port);
        if (claimed(port)) this.open(port);
      };
      if (!this.#closed) this.#retries.set(port, setTimeout(again, RETRY_MS));
    });
  }

  /** Frees, a little later, the ports that nobody has: one that goes to another instance now stays bound. */
  sweep(): void {
    if (this.#closed) return;
    this.#sweeping ??= setTimeout(() => {
      this.#sweeping = undefined;
      const now = performance.now();
      for (const [port, until] of this.#reserved) if (until <= now) this.#reserved.delete(port);
      for (const port of this.#open.keys()) {
        if (!this.#options.claimed(port) && !this.#reserved.has(port)) void this.#close(port);
      }
      if (this.#reserved.size > 0) this.sweep();
    }, SWEEP_MS);
  }

  /** Connections that were accepted before live on. */
  async [Symbol.asyncDispose](): Promise<void> {
    this.#closed = true;
    clearTimeout(this.#sweeping);
    for (const timer of this.#retries.values()) clearTimeout(timer);
    await Promise.all([...this.#open.keys()].map((port) => this.#close(port)));
  }

  async #close(port: number): Promise<void> {
    const servers = this.#open.get(port)!;
    this.#open.delete(port);
    // What did not bind has told whoever asked for it.
    for (const server of await servers.catch(() => [])) server.close();
  }

  #bind(port: number): Promise<Server[]> {
    let servers = this.#open.get(port);
    if (servers) return servers;
    servers = this.#listen(port);
    this.#open.set(port, servers);
    servers.catch(() => this.#open.delete(port));
    return servers;
  }

  async #listen(port: number): Promise<Server[]> {
    const { bind, accept, log } = this.#options;
    const servers: Server[] = [];
    try {
      for (const host of bind) {
        const server = createServer({ allowHalfOpen: true, highWaterMark: HIGH_WATER });
        server.on("connection", (socket) => accept(socket, port));
        await listening(server, host, port);
        server.on("error", (error) => log.error("Host port {port}: {reason}", { port, reason: error.message, error }));
        servers.push(server);
      }
      return servers;
    } catch (error) {
      for (const server of servers) server.close();
      const taken = (error as NodeJS.ErrnoException).code === "EADDRINUSE";
      const why = taken ? "another program listens on it" : messageOf(error);
      const details = { port };
      throw new DormouseError("port_conflict", `Cannot use host port "${port}": ${why}`, { cause: error, details });
    }
  }
}

async function listening(server: Server, host: string, port: number): Promise<void> {
  try {
    server.listen({ port, host, backlog: 511 });
    await once(server, "listening");
  } catch (error) {
    // A machine without IPv6 has no `::` to stand for everything.
    const { code } = error as NodeJS.ErrnoException;
    if (host !== "::" || (code !== "EAFNOSUPPORT" && code !== "EADDRNOTAVAIL")) throw error;
    server.listen({ port, host: "0.0.0.0", backlog: 511 });
    await once(server, "listening");
  }
}
