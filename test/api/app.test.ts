import assert from "node:assert/strict";
import { test } from "node:test";
import { configureSync, getLogger, type LogRecord, resetSync } from "@logtape/logtape";
import * as v from "valibot";
import type { ApiCall, ApiRoute } from "../../main.ts";
import { type AppContext, createApp } from "../../plugins/api/app.ts";
import { RouteTable } from "../../plugins/api/routes.ts";

const READER = "reader-token-0123456789";
const WRITER = "writer-token-0123456789";
const TOKENS = [
  { name: "reader", token: READER, scopes: ["instance:read"] },
  { name: "writer", token: WRITER, scopes: ["instance:*"] },
  { name: "all", token: "all-token-0123456789==", scopes: ["*"] },
];

function route(changes: Partial<ApiRoute> = {}): ApiRoute {
  const handle = () => ({ status: 200, body: { ok: true } });
  return { method: "GET", path: "/x", scope: "instance:read", summary: "X", responses: {}, handle, ...changes };
}

function app(routes: ApiRoute[], { options = {}, ...context }: {
  options?: Partial<AppContext["options"]>;
  closing?: AbortSignal;
  trusting?: boolean;
} = {}) {
  return createApp(routes, {
    log: getLogger(["dormouse", "api"]),
    closing: new AbortController().signal,
    trusting: true,
    plugins: new Map([["lazy", true]]),
    answered: () => {},
    ...context,
    options: { request_timeout: 300_000, tokens: [], access_log: true, ...options },
  });
}

const bearer = (token: string) => ({ headers: { Authorization: `Bearer ${token}` } });

test("route() refuses a route that could not be served as it is meant", () => {
  const cases: [Partial<ApiRoute>, RegExp][] = [
    [{ scope: undefined }, /no scope/],
    [{ scope: "" }, /no scope/],
    [{ responses: undefined }, /no responses/],
    [{ scope: "*" }, /scope "\*"/],
    [{ scope: "instance" }, /scope "instance"/],
    [{ scope: "instance:own" }, /scope "instance:own"/],
    [{ scope: "Instance:read" }, /scope "Instance:read"/],
    [{ scope: "public " }, /scope "public "/],
    [{ path: "x" }, /path/],
    [{ method: "TRACE" as ApiRoute["method"] }, /method/],
    [{ path: "/taken/:id" }, /there already/],
    [{ path: "/taken/:name" }, /there already/],
  ];
  for (const [changes, expected] of cases) {
    const table = new RouteTable();
    table.add(route({ path: "/taken/:id" }));
    assert.throws(() => table.add(route(changes)), expected, JSON.stringify(changes));
  }
  const table = new RouteTable();
  table.add(route());
  table.add(route({ method: "POST" }));
  assert.equal(table.take().length, 2);
  assert.throws(() => table.add(route({ path: "/late" })), /already up/);
});

test("take() gives a path without parameters before one that would match it too", () => {
  const table = new RouteTable();
  table.add(route({ path: "/instances/:id" }));
  table.add(route({ path: "/instances/usage" }));
  assert.deepEqual(table.take().map(({ path }) => path), ["/instances/usage", "/instances/:id"]);
});

test("a token opens the routes of its scopes and no others", async () => {
  const routes = [
    route({ path: "/read" }),
    route({ path: "/write", scope: "instance:write" }),
    route({ path: "/host", scope: "resource:read" }),
    route({ path: "/open", scope: "public" }),
  ];
  const served = app(routes, { options: { tokens: TOKENS }, trusting: false });
  const expected: Record<string, Record<string, number>> = {
    "": { "/read": 401, "/write": 401, "/host": 401, "/open": 200 },
    [READER]: { "/read": 200, "/write": 403, "/host": 403, "/open": 200 },
    [WRITER]: { "/read": 200, "/write": 200, "/host": 403, "/open": 200 },
    "all-token-0123456789==": { "/read": 200, "/write": 200, "/host": 200, "/open": 200 },
    [`${READER}x`]: { "/read": 401, "/open": 200 },
    [READER.slice(0, -1)]: { "/read": 401 },
    [READER.toUpperCase()]: { "/read": 401 },
  };
  for (const [token, paths] of Object.entries(expected)) {
    for (const [path, status] of Object.entries(paths)) {
      const response = await served.request(path, token === "" ? {} : bearer(token));
      assert.equal(response.status, status, `${path} with "${token}"`);
      if (status === 200) continue;
      const body = await response.json();
      assert.equal(body.code, status === 401 ? "unauthorized" : "forbidden");
      assert.doesNotMatch(JSON.stringify(body), /token-0123/);
      if (status === 401) assert.match(response.headers.get("WWW-Authenticate")!, /^Bearer/);
    }
  }
});

test("an Authorization header that holds no bearer token is a 401", async () => {
  const served = app([route()], { options: { tokens: TOKENS }, trusting: false });
  for (const value of ["Basic YTpi", "Bearer", `Bearer ${READER} x`, `bearer\t${READER}`, READER, "Bearer é"]) {
    const response = await served.request("/x", { headers: { Authorization: value } });
    assert.equal(response.status, 401, value);
    assert.equal((await response.json()).code, "unauthorized", value);
  }
});

test("a caller's token is the actor of what it does", async () => {
  let seen: ApiCall["origin"] | undefined;
  const handle = ({ origin }: ApiCall) => (seen = origin, { status: 204 });
  const id = { "X-Request-Id": "r-1" };
  await app([route({ handle })]).request("/x", { headers: id });
  assert.deepEqual(seen, { actor: "api", cause: "request", detail: { request_id: "r-1" } });
  const served = app([route({ handle })], { options: { tokens: TOKENS }, trusting: false });
  await served.request("/x", { headers: { ...id, ...bearer(WRITER).headers } });
  assert.equal(seen.actor, "api:writer");
});

test("a web page of another site cannot use a loopback API without tokens", async () => {
  const served = app([route()]);
  const cases: [Record<string, string>, number][] = [
    [{}, 200],
    [{ Host: "127.0.0.1:8080" }, 200],
    [{ Host: "localhost" }, 200],
    [{ Host: "LOCALHOST:8080" }, 200],
    [{ Host: "api.localhost:8080" }, 200],
    [{ Host: "[::1]:8080" }, 200],
    [{ Host: "127.8.8.8" }, 200],
    [{ Host: "localhost:8080", Origin: "http://localhost:8080" }, 200],
    [{ Host: "localhost:8080", "Sec-Fetch-Site": "same-origin" }, 200],
    [{ Host: "localhost:8080", "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate" }, 200],
    // DNS rebinding: the page's own name leads to 127.0.0.1.
    [{ Host: "evil.example:8080" }, 403],
    [{ Host: "localhost.evil.example" }, 403],
    [{ Host: "127.0.0.1.evil.example" }, 403],
    [{ Host: "10.0.0.1:8080" }, 403],
    [{ Host: "evil.example:8080", Origin: "http://evil.example:8080" }, 403],
    [{ Host: "localhost:8080", Origin: "https://evil.example" }, 403],
    [{ Host: "localhost:8080", Origin: "http://localhost:3000" }, 403],
    [{ Host: "localhost:8080", Origin: "null" }, 403],
    [{ Host: "localhost:8080", "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors" }, 403],
  ];
  for (const [headers, status] of cases) {
    const response = await served.request("/x", { headers });
    assert.equal(response.status, status, JSON.stringify(headers));
    if (status === 403) assert.equal((await response.json()).code, "forbidden");
  }
  // With tokens a page has none, and the host may be reached by any name.
  const guarded = app([route()], { options: { tokens: TOKENS }, trusting: false });
  const headers = { ...bearer(READER).headers, Host: "dormouse.example" };
  assert.equal((await guarded.request("/x", { headers })).status, 200);
});

test("a request id is taken over when it is sound and made when it is not", async () => {
  const served = app([route()]);
  const idOf = async (given: string) =>
    (await served.request("/x", { headers: { "X-Request-Id": given } })).headers.get("X-Request-Id");
  assert.equal(await idOf("abc-DEF_1="), "abc-DEF_1=");
  for (const bad of ["", "a b", "x".repeat(65), '"><script>', "a;b"]) {
    assert.match(await idOf(bad) ?? "", /^[0-9a-f-]{36}$/, bad);
  }
  assert.ok((await served.request("/nowhere")).headers.get("X-Request-Id"));
});

test("each request is one structured log line, without query or token", async (t) => {
  const records: LogRecord[] = [];
  const loggers = [{ category: "dormouse", lowestLevel: "info" as const, sinks: ["memory"] }];
  configureSync({
    reset: true,
    sinks: { memory: (record) => void records.push(record) },
    loggers: [
      ...loggers,
      { category: ["logtape", "meta"], lowestLevel: "warning", sinks: ["memory"] },
    ],
  });
  t.after(() => resetSync());
  const served = app([route({ path: "/x/:id" })], { options: { tokens: TOKENS }, trusting: false });
  const init = { headers: { ...bearer(READER).headers, "X-Request-Id": "r-2" } };
  await served.request("/x/secret-name", init);
  await served.request("/nowhere?password=1");
  assert.equal(records.length, 2);
  const { ms, ...properties } = records[0].properties;
  assert.equal(typeof ms, "number");
  assert.deepEqual(properties, { method: "GET", route: "/x/:id", status: 200, id: "r-2", token: "reader" });
  assert.equal(records[1].properties.status, 404);
  assert.doesNotMatch(JSON.stringify(records), /password|secret-name|0123456789/);
});

test("a request that takes too long is a 504, and a long one is not cut", async () => {
  const slow = Promise.withResolvers<void>();
  const handle = async () => (await slow.promise, { status: 200, body: {} });
  const routes = [route({ path: "/slow", handle }), route({ path: "/long", handle, long: true })];
  const served = app(routes, { options: { request_timeout: 20 } });
  const long = served.request("/long");
  const response = await served.request("/slow");
  assert.equal(response.status, 504);
  const body = await response.json();
  assert.equal(body.code, "request_timeout");
  assert.equal(body.message, "Cannot wait for GET /slow: over 20ms");
  slow.resolve();
  assert.equal((await long).status, 200);
});

test("a host that closes answers 503 and ends long calls; public routes still tell so", async () => {
  const closing = new AbortController();
  const waiting = Promise.withResolvers<void>();
  const handle = ({ signal }: ApiCall) =>
    new Promise<{ status: number }>((resolve) => {
      signal.addEventListener("abort", () => resolve({ status: 204 }), { once: true });
      waiting.resolve();
    });
  const routes = [route(), route({ path: "/long", handle, long: true }), route({ path: "/health", scope: "public" })];
  const served = app(routes, { closing: closing.signal });
  const long = served.request("/long");
  await waiting.promise;
  closing.abort();
  assert.equal((await long).status, 204);
  const refused = await served.request("/x");
  assert.equal(refused.status, 503);
  assert.equal((await refused.json()).code, "shutting_down");
  assert.equal((await served.request("/health")).status, 200);
});

test("a body is refused over 1 MiB whether its length is told or not", async () => {
  const body = v.object({ text: v.string() });
  const served = app([route({ method: "POST", body, handle: (call) => ({ status: 200, body: call.body }) })]);
  const post = (init: RequestInit & { duplex?: "half" }) =>
    served.request("/x", { method: "POST", ...init, headers: { "Content-Type": "application/json" } });
  const text = (bytes: number) => JSON.stringify({ text: "x".repeat(bytes - '{"text":""}'.length) });
  const stream = (chunk: string) => new Blob([chunk]).stream();
  assert.equal((await post({ body: text(1 << 20) })).status, 200);
  assert.equal((await post({ body: text((1 << 20) + 1) })).status, 413);
  assert.equal((await post({ body: stream(text(1 << 20)), duplex: "half" })).status, 200);
  const refused = await post({ body: stream(text((1 << 20) + 1)), duplex: "half" });
  assert.equal(refused.status, 413);
  assert.equal((await refused.json()).code, "payload_too_large");
});

test("a plugin's schema is enforced, unknown keys too, with the code that the route has for a field", async () => {
  const routed = route({
    method: "POST",
    path: "/y/:id",
    body: () => v.object({ size: v.optional(v.string()), count: v.optional(v.number()) }),
    bodyOptional: true,
    query: v.object({ dry: v.optional(v.string()) }),
    codes: { size: "invalid_size" },
    handle: ({ params, query, body }) => ({ status: 201, body: { params, query, body } }),
  });
  const served = app([routed]);
  const post = async (path: string, body?: string, type = "application/json") => {
    const init = { method: "POST", ...(body !== undefined && { body, headers: { "Content-Type": type } }) };
    const response = await served.request(path, init);
    return { status: response.status, body: await response.json() };
  };
  const fine = await post("/y/a%2Fb?dry=1", '{"count":1}', "application/json; charset=utf-8");
  assert.deepEqual(fine, { status: 201, body: { params: { id: "a/b" }, query: { dry: "1" }, body: { count: 1 } } });
  assert.deepEqual((await post("/y/a")).body.body, {});
  assert.deepEqual((await post("/y/a", "")).body.body, {});
  assert.equal((await post("/y/a", '{"size":1}')).body.code, "invalid_size");
  assert.equal((await post("/y/a", '{"count":"1"}')).body.code, "invalid_request");
  assert.match((await post("/y/a", '{"cont":1}')).body.message, /did you mean "count"/);
  assert.match((await post("/y/a?dri=1")).body.message, /did you mean "dry"/);
  assert.equal((await post("/y/a", "null")).body.code, "invalid_request");
});

test("a Response of a handler keeps its own headers and gets the request id", async () => {
  const handle = () => new Response("plain", { status: 202, headers: { "Content-Type": "text/x", "X-Own": "1" } });
  const response = await app([route({ handle })]).request("/x", { headers: { "X-Request-Id": "r-3" } });
  assert.equal(response.status, 202);
  assert.equal(await response.text(), "plain");
  assert.equal(response.headers.get("X-Own"), "1");
  assert.equal(response.headers.get("X-Request-Id"), "r-3");
});
