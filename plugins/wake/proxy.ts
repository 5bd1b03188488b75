import type { Socket } from "node:net";
import type { Claims } from "./claims.ts";
import type { Gate } from "./gate.ts";
import { refuse, splice } from "./splice.ts";
import { Refused } from "./waker.ts";

/** Milliseconds that connections under way may take to end when the host closes. */
const GRACE_MS = 5_000;

/** What the listeners of host ports hand their connections to: those that the kernel did not forward by itself. */
export class Proxy implements AsyncDisposable {
  readonly #claims: Claims;
  readonly #gate: Gate;
  readonly #pairs = new Map<Socket, Socket>();
  #empty: (() => void) | undefined;

  constructor(claims: Claims, gate: Gate) {
    this.#claims = claims;
    this.#gate = gate;
  }

  /** Connections that go through this process now. */
  get size(): number {
    return this.#pairs.size;
  }

  accept = (client: Socket, port: number): void => {
    client.on("error", () => {}); // `close` follows
    client.setNoDelay(true);
    const published = this.#claims.port(port);
    if (!published) return void client.destroy();
    const left = new AbortController();
    const leave = () => left.abort(new Error("The client has gone"));
    client.once("close", leave);
    // Reads until its buffer is full, without which nobody would notice that the client has gone.
    const reading = () => {};
    client.on("readable", reading);
    this.#gate.reach(published.instance_id, published.guest_port, "port", left.signal).then(
      (upstream) => {
        client.off("close", leave).off("readable", reading);
        this.join(client, upstream);
      },
      (error) => {
        client.off("close", leave).off("readable", reading);
        if (client.destroyed) return;
        if (error instanceof Refused) refuse(client, error.status);
        else client.resetAndDestroy(); // awake and not listening: as it would itself
      },
    );
  };

  /** Joins the two until both have ended. */
  join(client: Socket, upstream: Socket): void {
    if (client.destroyed) return void upstream.resetAndDestroy();
    this.#pairs.set(client, upstream);
    upstream.once("close", () => {
      this.#pairs.delete(client);
      if (this.#pairs.size === 0) this.#empty?.();
    });
    splice(client, upstream);
  }

  /** Lets what is under way end, but not for long. */
  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#pairs.size === 0) return;
    const { promise, resolve } = Promise.withResolvers<void>();
    this.#empty = resolve;
    const timer = setTimeout(resolve, GRACE_MS);
    await promise;
    clearTimeout(timer);
    for (const sockets of [...this.#pairs]) for (const socket of sockets) socket.destroy();
  }
}
