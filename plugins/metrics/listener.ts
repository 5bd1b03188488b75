import { once } from "node:events";
import type { Server as HttpServer } from "node:http";
import type { AddressInfo } from "node:net";
import { createAdaptorServer } from "@hono/node-server";
import type { Logger } from "@logtape/logtape";
import { Hono, type MiddlewareHandler } from "hono";
import { bearerAuth } from "hono/bearer-auth";
import { HTTPException } from "hono/http-exception";
import { messageOf } from "../shared/errors.ts";
import { isLoopbackName } from "../shared/listen.ts";

export interface ListenerOptions {
  hostname: string;
  port: number;
  /** Asked for where there is one. */
  token: string | undefined;
  log: Logger;
}
export interface Listener {
  /** `http://127.0.0.1:9464/metrics` */
  readonly url: string;
  close(): Promise<void>;
}

/** Serves `GET /metrics` on an address of its own. @throws {Error} the socket's own, `EADDRINUSE` and the like */
export async function listen(scrape: () => Promise<Response>, options: ListenerOptions): Promise<Listener> {
  const { hostname, port, token, log } = options;
  const app = new Hono();
  app.use(token === undefined ? refuseWebPages : bearerAuth({ token }));
  app.onError((error, c) => {
    if (error instanceof HTTPException) return error.getResponse();
    log.error("Scrape failed: {reason}", { reason: messageOf(error), error });
    return c.text("Cannot read the metrics: the log says why\n", 500);
  });
  app.get("/metrics", scrape);
  // Its own Response in the place of the global one, which it would put there, is none that Deno.serve takes.
  const server = createAdaptorServer({ fetch: app.fetch, overrideGlobalObjects: false }) as HttpServer;
  server.listen({ host: hostname, port });
  await once(server, "listening"); // rejects on "error"
  const bound = server.address() as AddressInfo;
  const shown = bound.address.includes(":") ? `[${bound.address}]` : bound.address;
  return {
    url: `http://${shown}:${bound.port}/metrics`,
    async close() {
      const closed = once(server, "close");
      server.close();
      // Prometheus keeps its connection; a scrape that is cut off is one that is missed.
      server.closeAllConnections();
      await closed;
    },
  };
}

// Without a token everybody on this machine may read; a page that has its own name point here (DNS rebinding) is not.
const refuseWebPages: MiddlewareHandler = async (c, next) => {
  if (!isLoopbackName(c.req.header("Host") ?? "localhost")) return c.text("Not for web pages\n", 403);
  await next();
};
