import { once } from "node:events";
import { createServer, type IncomingMessage, request as send, type ServerResponse, STATUS_CODES } from "node:http";
import type { AddressInfo, Socket } from "node:net";
import type { Logger } from "@logtape/logtape";
import type { Hypervisor } from "../../main.ts";
import { deadline } from "../shared/async.ts";
import { messageOf } from "../shared/errors.ts";
import type { Claims } from "./claims.ts";
import type { Gate } from "./gate.ts";
import { hostOf, requestHeaders, responseHeaders } from "./headers.ts";
import { httpPortOf, policyOf } from "./policy.ts";
import type { Proxy } from "./proxy.ts";
import { Refused } from "./waker.ts";

/** Milliseconds that requests under way may take to end when the host closes. */
const GRACE_MS = 5_000;

export interface RouterOptions {
  claims: Claims;
  gate: Gate;
  proxy: Proxy;
  hypervisor: Hypervisor;
  log: Logger;
}

/** Leads HTTP requests by their Host to instances, which are woken for them. Only hosts that an instance lists do so. */
export class Router implements AsyncDisposable {
  readonly counts = { requests: 0, unknown: 0 };
  readonly #options: RouterOptions;
  readonly #server = createServer({ requestTimeout: 0 }); // an upload may take its time; headers may not
  /** Upgrades that are not joined yet. */
  readonly #upgrading = new Set<Socket>();

  constructor(options: RouterOptions) {
    this.#options = options;
    this.#server.on("request", (request, response) => void this.#request(request, response));
    this.#server.on("upgrade", (request, socket, head) => void this.#upgrade(request, socket as Socket, head));
  }

  /** Resolves to the address it listens on. @throws {Error} `EADDRINUSE` and the like */
  async listen({ host, port }: { host: string; port: number }): Promise<AddressInfo> {
    this.#server.listen({ host, port });
    await once(this.#server, "listening");
    const { log } = this.#options;
    this.#server.on("error", (error) => log.error("http_listen: {reason}", { reason: error.message, error }));
    return this.#server.address() as AddressInfo;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (!this.#server.listening) return;
    const closed = once(this.#server, "close");
    this.#server.close();
    this.#server.closeIdleConnections();
    await deadline(closed, GRACE_MS, "Closing http_listen").catch(() => this.#server.closeAllConnections());
    for (const socket of this.#upgrading) socket.destroy();
  }

  async #request(request: IncomingMessage, response: ServerResponse): Promise<void> {
    const left = new AbortController();
    response.once("close", () => left.abort(new Error("The client has gone")));
    response.on("error", () => {}); // `close` follows
    const answer = (status: number) => {
      if (response.headersSent || response.destroyed) return void response.destroy();
      // What is left of the body is not read: the connection cannot be used again.
      const again = status === 503 ? { "Retry-After": "1" } : {};
      response.writeHead(status, { Connection: "close", ...again }).end(`${status} ${STATUS_CODES[status]}\n`);
    };
    const upstream = await this.#reach(request, left.signal, answer);
    if (!upstream) return;
    response.once("close", () => upstream.destroy());
    const outgoing = this.#send(request, upstream, requestHeaders(request));
    outgoing.on("error", () => answer(502));
    outgoing.on("response", (incoming) => {
      response.writeHead(incoming.statusCode!, incoming.statusMessage, responseHeaders(incoming));
      response.flushHeaders();
      incoming.on("error", () => response.destroy());
      incoming.once("close", () => {
        if (!incoming.complete) response.destroy();
      });
      incoming.pipe(response);
    });
    request.on("error", () => upstream.destroy());
    request.pipe(outgoing);
  }

  async #upgrade(request: IncomingMessage, client: Socket, head: Uint8Array): Promise<void> {
    client.on("error", () => {}); // `close` follows
    this.#upgrading.add(client);
    const left = new AbortController();
    client.once("close", () => {
      this.#upgrading.delete(client);
      left.abort(new Error("The client has gone"));
    });
    const answer = (status: number) => {
      const again = status === 503 ? "Retry-After: 1\r\n" : "";
      const text = `HTTP/1.1 ${status} ${
        STATUS_CODES[status]
      }\r\n${again}Connection: close\r\nContent-Length: 0\r\n\r\n`;
      if (!client.destroyed) client.end(text, () => client.destroy());
    };
    // A body would have to be told from what follows the upgrade; no protocol of today sends one.
    const { "content-length": length = "0", "transfer-encoding": encoding } = request.headers;
    if (length !== "0" || encoding) return answer(400);
    const upstream = await this.#reach(request, left.signal, answer);
    if (!upstream) return;
    client.once("close", () => upstream.destroy());
    const outgoing = this.#send(request, upstream, requestHeaders(request, { upgrade: true }));
    outgoing.on("error", () => answer(502));
    outgoing.on("upgrade", (incoming, _socket, rest) => {
      const headers = [
        ...responseHeaders(incoming),
        "Connection",
        "Upgrade",
        "Upgrade",
        incoming.headers.upgrade ?? "",
      ];
      client.write(headOf(incoming, headers));
      if (rest.length > 0) client.write(rest);
      if (head.length > 0) upstream.write(head);
      this.#upgrading.delete(client);
      this.#options.proxy.join(client, upstream);
    });
    outgoing.on("response", (incoming) => {
      client.write(headOf(incoming, [...responseHeaders(incoming), "Connection", "close"]));
      incoming.on("error", () => client.destroy());
      incoming.pipe(client); // without chunks, so it ends where the connection does
    });
    outgoing.end();
  }

  /** A connection to whom the request is for; undefined once it has been answered with why there is none. */
  async #reach(
    request: IncomingMessage,
    left: AbortSignal,
    answer: (status: number) => void,
  ): Promise<Socket | undefined> {
    const { claims, gate, hypervisor, log } = this.#options;
    this.counts.requests++;
    const id = claims.host(hostOf(request));
    const instance = id === undefined ? undefined : hypervisor.find(id);
    if (!instance) {
      this.counts.unknown++;
      return void answer(404);
    }
    try {
      const upstream = await gate.reach(instance.id, httpPortOf(policyOf(instance)), "http", left);
      if (!left.aborted) return upstream;
      upstream.destroy();
    } catch (error) {
      if (left.aborted) return;
      log.debug("Request for {name}: {reason}", { name: instance.name, reason: messageOf(error) });
      answer(error instanceof Refused ? error.status : 502);
    }
  }

  #send({ method, url }: IncomingMessage, socket: Socket, headers: string[]) {
    return send({ createConnection: () => socket, method, path: url, headers });
  }
}

function headOf({ statusCode, statusMessage }: IncomingMessage, headers: string[]): string {
  const lines = [`HTTP/1.1 ${statusCode} ${statusMessage}`];
  for (let i = 0; i < headers.length; i += 2) lines.push(`${headers[i]}: ${headers[i + 1]}`);
  return `${lines.join("\r\n")}\r\n\r\n`;
}
