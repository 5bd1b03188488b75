import { once } from "node:events";
import { lstatSync, unlinkSync } from "node:fs";
import type { Server as HttpServer } from "node:http";
import type { AddressInfo } from "node:net";
import { connect } from "node:net";
import process from "node:process";
import { createAdaptorServer } from "@hono/node-server";
import { deadline } from "../shared/async.ts";
import type { Listen } from "../shared/listen.ts";

type Fetch = (request: Request) => Response | Promise<Response>;

/** Milliseconds for an answer to be sent that is complete; who does not read it in that time has the connection to the end. */
const FLUSH_MS = 1_000;

/** A server that listens. */
export interface Server {
  /** `http://127.0.0.1:8080`, or `unix:/path`. */
  readonly url: string;
  /** Waits at most `grace` milliseconds for the requests under way, then cuts what is left. Resolves when it is closed. */
  close(grace: number): Promise<void>;
}

/** Listens with the runtime's own server: Deno.serve, which is twice as fast there, or Node's. */
export async function listen(fetch: Fetch, address: Listen): Promise<Server> {
  if ("path" in address) await removeStale(address.path);
  const serve = "Deno" in globalThis ? serveDeno : serveNode;
  // A socket file is made before the call returns, so nobody else can reach it between its making and a chmod.
  const before = "path" in address ? process.umask(0o177) : undefined;
  let serving: Promise<Server>;
  try {
    serving = serve(fetch, address);
  } finally {
    if (before !== undefined) process.umask(before);
  }
  return await serving;
}

function serveDeno(fetch: Fetch, address: Listen): Promise<Server> {
  const abort = new AbortController();
  const underWay = new Set<Promise<void>>();
  const server = Deno.serve(
    { ...address as { path: string }, signal: abort.signal, onListen() {} },
    (request, info) => {
      const done = info.completed.catch(() => {}).finally(() => underWay.delete(done));
      underWay.add(done);
      return fetch(request);
    },
  );
  return Promise.resolve({
    url: urlOf(server.addr as unknown as Bound, address),
    close: async (grace) => {
      // An answer counts as complete before it is sent, and an abort cuts it off; after a shutdown an abort throws.
      if (await within(grace, Promise.all(underWay))) await within(FLUSH_MS, server.shutdown());
      else {
        abort.abort();
        await server.finished;
      }
    },
  });
}

async function serveNode(fetch: Fetch, address: Listen): Promise<Server> {
  const server = createAdaptorServer({ fetch }) as HttpServer;
  const underWay = new Set<Promise<unknown>>();
  server.on("request", (_request, response) => {
    const done = once(response, "close").finally(() => underWay.delete(done));
    underWay.add(done);
  });
  server.listen("path" in address ? { path: address.path } : { host: address.hostname, port: address.port });
  await once(server, "listening"); // rejects on "error", such as an address in use
  const { address: hostname, port } = Object(server.address()) as AddressInfo;
  return {
    url: urlOf({ hostname, port }, address),
    close: async (grace) => {
      const closed = once(server, "close");
      server.close();
      await within(grace, Promise.all(underWay));
      // Those too that a client opened to have one ready, which Node does not count as idle.
      server.closeAllConnections();
      await closed;
    },
  };
}

interface Bound {
  hostname: string;
  port: number;
}

function urlOf({ hostname, port }: Bound, address: Listen): string {
  if ("path" in address) return `unix:${address.path}`;
  return `http://${hostname.includes(":") ? `[${hostname}]` : hostname}:${port}`;
}

/** Whether the work was done in time. */
async function within(ms: number, work: Promise<unknown>): Promise<boolean> {
  try {
    await deadline(work, ms, "Closing the server");
    return true;
  } catch (error) {
    if (error instanceof DOMException && error.name === "TimeoutError") return false;
    throw error;
  }
}

/** Removes the socket file of a host that died; one that somebody still answers on is left, and listening then fails. */
async function removeStale(path: string): Promise<void> {
  if (!lstatSync(path, { throwIfNoEntry: false })?.isSocket()) return;
  const socket = connect(path);
  try {
    await once(socket, "connect");
  } catch (error) {
    if ((error as { code?: string }).code !== "ECONNREFUSED") throw error;
    unlinkSync(path);
  } finally {
    socket.destroy();
  }
}
