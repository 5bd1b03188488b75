import type { Logger } from "@logtape/logtape";
import { type Context, Hono, type MiddlewareHandler } from "hono";
import { bodyLimit } from "hono/body-limit";
import { HTTPException } from "hono/http-exception";
import { methodNotAllowed } from "hono/method-not-allowed";
import { requestId } from "hono/request-id";
import { timeout } from "hono/timeout";
import type { ContentfulStatusCode } from "hono/utils/http-status";
import { type ApiCall, type ApiRequest, type ApiRoute, DormouseError, type Origin } from "../../main.ts";
import { formatDuration } from "../shared/duration.ts";
import { type Env, PUBLIC, refuseWebPages, requireScope } from "./access.ts";
import { bodyOf, chainOf, toDormouseError } from "./errors.ts";
import { bodyReader, bodyValidator, queryValidator, validated } from "./input.ts";
import { described } from "./openapi.ts";
import { noRoute } from "./off.ts";
import type { ApiOptions } from "./options.ts";
import { closingError, JsonText } from "./routes.ts";

const MAX_BODY = 1024 * 1024;
/** Of a body that is too large, how much is read and for how long, in milliseconds. */
const DISCARD_AT_MOST = 16 * 1024 * 1024;
const DISCARD_FOR = 5_000;
const JSON_HEADERS = { "Content-Type": "application/json" };

export type App = Hono<Env>;

export interface AppContext {
  options: Pick<ApiOptions, "request_timeout" | "tokens" | "access_log">;
  log: Logger;
  /** Aborts when the host begins to close. */
  closing: AbortSignal;
  /** Whether a request without a token is trusted, and so must not come from a web page. */
  trusting: boolean;
  plugins: ReadonlyMap<string, boolean>;
  /** Told of each request, after it. */
  answered(request: ApiRequest): void;
}

/** Makes the Hono app of all routes: what every request goes through, then what each route needs. */
export function createApp(routes: readonly ApiRoute[], context: AppContext): App {
  const { log, options, trusting, plugins, answered } = context;
  const app: App = new Hono<Env>();
  app.use(requestId({ limitLength: 64 }));
  app.use(watched(answered, options.access_log ? log : null));
  app.use(methodNotAllowed({ app: app as unknown as Hono, onMethodNotAllowed: refuseMethod }));
  if (trusting) app.use(refuseWebPages);
  app.use(bodyLimit({ maxSize: MAX_BODY, onError: refuseSize }));
  for (const route of routes) app.on(route.method, [route.path], ...handlersOf(route, context));
  app.notFound((c) => c.json(bodyOf(noRoute(c.req.method, c.req.path, plugins)), 404));
  app.onError((error, c) => {
    // Hono's own refusals, such as that of a missing token, come with the answer.
    if (error instanceof HTTPException && error.res) return c.newResponse(error.res.body, error.res);
    const known = toDormouseError(error, c.var.requestId);
    if (known.status >= 500 && known.code !== "not_supported") {
      const request = { id: c.var.requestId, method: c.req.method, path: c.req.path };
      log.error("Request {id} {method} {path} failed: {reason}", { ...request, reason: chainOf(known), error: known });
    }
    return c.json(bodyOf(known), known.status as ContentfulStatusCode);
  });
  return app;
}

function handlersOf(route: ApiRoute, { options, closing }: AppContext): MiddlewareHandler<Env>[] {
  const { method, path, scope, long, codes, bodyOptional = false, bodyChecked: checked } = route;
  const limit = options.request_timeout;
  const late = () =>
    new HTTPException(504, {
      cause: new DormouseError("request_timeout", `Cannot wait for ${method} ${path}: over ${formatDuration(limit)}`),
    });
  const body = typeof route.body === "function" ? route.body() : route.body;
  return [
    async (c, next) => {
      c.set("pattern", path);
      if (closing.aborted && scope !== PUBLIC) throw closingError();
      // Hono answers HEAD by GET and drops the body, and nobody would ever end a stream that is dropped.
      if (long && c.req.method === "HEAD") return refuseMethod(c, [method]);
      await next();
    },
    ...requireScope(scope, options.tokens),
    ...(long ? [] : [timeout(limit, late)]),
    ...(body ? [bodyReader(bodyOptional), bodyValidator(body, { codes, checked })] : []),
    ...(scope === PUBLIC && !route.query ? [] : [queryValidator(route.query, codes)]),
    described(route),
    async (c) => answer(c, await route.handle(callOf(c, route, closing))),
  ];
}

function callOf(c: Context<Env>, { long }: ApiRoute, closing: AbortSignal): ApiCall {
  const { requestId, caller } = c.var;
  const origin: Origin = {
    actor: caller?.token === undefined ? "api" : `api:${caller.token}`,
    cause: "request",
    detail: { request_id: requestId },
  };
  // Only long calls end when their client leaves: a stop goes on, for it must not be left half-way.
  const signal = long ? AbortSignal.any([c.req.raw.signal, closing]) : closing;
  const { query, body } = validated(c);
  return { id: requestId, params: c.req.param(), query, body, headers: c.req.raw.headers, signal, origin };
}

function answer(c: Context<Env>, result: Awaited<ReturnType<ApiRoute["handle"]>>): Response {
  if (result instanceof Response) return c.newResponse(result.body, result);
  const status = result.status as ContentfulStatusCode;
  if (result.body === undefined) return c.newResponse(null, status);
  const text = result.body instanceof JsonText ? result.body.text : JSON.stringify(result.body);
  return c.body(text, status, JSON_HEADERS);
}

function watched(answered: AppContext["answered"], log: Logger | null): MiddlewareHandler<Env> {
  return async function watched(c, next) {
    const begun = performance.now();
    await next();
    const [method, route, status] = [c.req.method, c.var.pattern ?? "none", c.res.status];
    const duration_ms = performance.now() - begun;
    answered({ method, route, status, duration_ms });
    log?.info("{method} {route} {status} in {ms} ms", {
      method,
      route,
      status,
      ms: Math.round(duration_ms * 10) / 10,
      id: c.var.requestId,
      ...(c.var.caller?.token !== undefined && { token: c.var.caller.token }),
    });
  };
}

function refuseMethod(c: Context, methods: string[]): Response {
  const allow = methods.toSorted().join(", ");
  const error = new DormouseError(
    "method_not_allowed",
    `Cannot ${c.req.method} ${c.req.path.slice(0, 200)}: use ${allow}`,
  );
  return c.json(bodyOf(error), 405, { Allow: allow });
}

async function refuseSize(c: Context): Promise<never> {
  await discard(c.req.raw.body);
  throw new DormouseError("payload_too_large", `The body is over ${MAX_BODY} bytes`);
}

/** A client that is still sending would see its connection break, and not the answer. Up to a bound, that is. */
async function discard(body: ReadableStream<Uint8Array> | null): Promise<void> {
  if (body === null || body.locked) return;
  const until = AbortSignal.timeout(DISCARD_FOR);
  let bytes = 0;
  const sink = new WritableStream<Uint8Array>({
    write(chunk) {
      bytes += chunk.length;
      if (bytes > DISCARD_AT_MOST) throw new RangeError("The body is far too large");
    },
  });
  // What breaks it off is the bound or the client, and the answer is the same.
  await body.pipeTo(sink, { signal: until }).catch(() => {});
}
