import assert from "node:assert/strict";
import { test, type TestContext } from "node:test";
import { definePlugin, type Plugin } from "../../main.ts";
import apiPlugin from "../../plugins/api/mod.ts";
import hypervisorPlugin from "../../plugins/hypervisor/mod.ts";
import lazyPlugin from "../../plugins/lazy/mod.ts";
import { delay } from "../../plugins/shared/async.ts";
import storePlugin from "../../plugins/store.ts";
import { openStream } from "../api/support.ts";
import { startWith, until } from "../helpers.ts";
import { gate, ScriptedDriver } from "../hypervisor/scripted.ts";
import type { Metrics } from "./world.ts";

interface Options {
  api?: Record<string, unknown>;
  lazy?: Record<string, unknown> | null;
}
interface Body {
  [key: string]: unknown;
  code: string;
  details: Record<string, unknown>;
  id: string;
  lease: string;
  expires_at: string;
  started: boolean;
  state: string;
  lifecycle_state: string | null;
  lifecycle_metrics: Metrics | null;
}

/** The real API on loopback, by the real clock, with the scripted driver. */
async function served(t: TestContext, { api = {}, lazy = {} }: Options = {}) {
  const driver = new ScriptedDriver();
  const scripted = definePlugin({
    name: "scripted",
    requires: ["hypervisor"],
    setup: (host) => void host.use("hypervisor").register(driver),
  });
  const all = [storePlugin, hypervisorPlugin, scripted, apiPlugin, ...(lazy ? [lazyPlugin] : [])] as Plugin[];
  const host = await startWith(t, all, {
    tables: {
      hypervisor: { default_driver: "scripted" },
      api: { listen: "127.0.0.1:0", access_log: false, ...api },
      ...(lazy && { lazy }),
    },
  });
  const { url } = host.use("api");
  const call = async (method: string, path: string, body?: unknown, more: RequestInit = {}) => {
    const text = body === undefined ? {} : { body: JSON.stringify(body) };
    const headers = { "Content-Type": "application/json", ...more.headers };
    const response = await fetch(url + path, { ...more, method, ...text, headers });
    const answer = await response.text();
    return { status: response.status, body: (answer === "" ? {} : JSON.parse(answer)) as Body };
  };
  const create = (name: string, policy?: unknown) =>
    call("POST", "/instances", { name, image: "any", ...(policy !== undefined && { lazy: policy }) });
  return {
    host,
    driver,
    call,
    create,
    url,
    state: async (name: string) => (await call("GET", `/instances/${name}`)).body,
  };
}

test("a lease is acquired, renewed and released over HTTP, and streams tell of the start", async (t) => {
  const { call, create, state, url, host } = await served(t);
  const { id } = (await create("web", { enabled: true })).body;
  await call("POST", "/instances/web/stop");
  const { event } = await openStream(t, `${url}/events?type=container.lazy_started`);
  const { status, body } = await call("POST", `/instances/${id}/acquire`, { ttl: "10m" });
  assert.deepEqual([status, Object.keys(body)], [201, ["lease", "instance", "expires_at", "latency_ms", "started"]]);
  assert.deepEqual([body.instance, body.started, typeof body.latency_ms], [id, true, "number"]);
  const message = (await event())!;
  const { type, instance, ts, summary, detail } = JSON.parse(message.data!);
  assert.deepEqual([message.event, type, instance, Object.keys(detail)], [
    "container.lazy_started",
    "container.lazy_started",
    id,
    ["instance", "latency_ms"],
  ]);
  assert.deepEqual([detail.instance, new Date(ts).toISOString(), typeof summary], [id, ts, "string"]);

  const second = await call("POST", "/instances/web/acquire");
  assert.deepEqual([second.status, second.body.started], [201, false]);
  const renewed = await call("POST", `/instances/web/leases/${body.lease}/renew`, { ttl: "1h" });
  assert.deepEqual([renewed.status, Object.keys(renewed.body)], [200, ["lease", "instance", "expires_at"]]);
  assert.ok(Date.parse(renewed.body.expires_at) > Date.parse(body.expires_at));
  assert.deepEqual([(await state("web")).lifecycle_state, host.use("lazy").stats().leases], ["running", 2]);
  for (const { lease } of [body, second.body]) {
    assert.equal((await call("DELETE", `/instances/web/leases/${lease}`)).status, 204);
    const again = await call("DELETE", `/instances/web/leases/${lease}`);
    assert.deepEqual([again.status, again.body.code], [404, "lease_not_found"]);
    const late = await call("POST", `/instances/web/leases/${lease}/renew`);
    assert.deepEqual([late.status, late.body.code], [404, "lease_not_found"]);
  }
  assert.equal((await state("web")).lifecycle_state, "idle");
});

test("instances show their lifecycle, both fields null for those that are not lazy, and agents are the lazy ones", async (t) => {
  const { call, create, state } = await served(t);
  await create("plain");
  await create("off", { enabled: false });
  const { id, lazy } = (await create("web", { enabled: true, via: "standby" })).body;
  assert.deepEqual(lazy, { enabled: true, idle_stop: "5m0s", start_timeout: "1m0s", via: "standby" });
  for (const name of ["plain", "off"]) {
    const { lifecycle_state, lifecycle_metrics } = await state(name);
    assert.deepEqual([lifecycle_state, lifecycle_metrics], [null, null]);
  }
  const none = { last: null, mean: null, min: null, max: null, count: 0 };
  const lifecycle_metrics = {
    starts: 0,
    start_failures: 0,
    stops: 0,
    stop_failures: 0,
    leases_granted: 0,
    start_latency_ms: none,
    idle_seconds: none,
    last_event: null,
  };
  const shown = await state("web");
  assert.deepEqual([shown.lifecycle_state, shown.lifecycle_metrics], ["idle", lifecycle_metrics]);
  const agents = await call("GET", "/agents");
  const agent = { id, name: "web", type: "scripted", state: { lifecycle_state: "idle", lifecycle_metrics } };
  assert.deepEqual([agents.status, agents.body], [200, [agent]]);
  await call("PATCH", "/instances/web", { lazy: null });
  assert.deepEqual((await call("GET", "/agents")).body, []);
});

test("what is wrong with a lease's request is answered with its own code", async (t) => {
  const { call, create } = await served(t, { lazy: { max_ttl: "1h" } });
  await create("plain");
  await create("web", { enabled: true });
  for (
    const [path, body, status, code] of [
      ["/instances/web/acquire", { ttl: "soon" }, 400, "invalid_ttl"],
      ["/instances/web/acquire", { ttl: "0s" }, 400, "invalid_ttl"],
      ["/instances/web/acquire", { ttl: 60 }, 400, "invalid_ttl"],
      ["/instances/web/acquire", { ttl: "61m" }, 400, "invalid_ttl"],
      ["/instances/web/acquire", { tll: "1m" }, 400, "invalid_request"],
      ["/instances/web/leases/none/renew", {}, 404, "lease_not_found"],
      ["/instances/plain/acquire", {}, 409, "not_lazy"],
      ["/instances/nobody/acquire", {}, 404, "not_found"],
    ] as const
  ) {
    const answer = await call("POST", path, body);
    assert.deepEqual([answer.status, answer.body.code], [status, code], `${path} ${JSON.stringify(body)}`);
  }
  const wrong = await create("other", { enabled: true, idle_stop: "never" });
  assert.deepEqual([wrong.status, wrong.body.code, wrong.body.details.field], [400, "invalid_lazy", "lazy.idle_stop"]);
});

test("an acquire is not cut by the request timeout, and a client that leaves gets no lease", async (t) => {
  const { call, create, driver, host, state } = await served(t, {
    api: { request_timeout: "1s" },
    lazy: { max_leases: 1 },
  });
  await create("web", { enabled: true });
  await call("POST", "/instances/web/stop");
  const { script, arrived, open } = gate();
  driver.script.start = script;
  const client = new AbortController();
  const left = call("POST", "/instances/web/acquire", {}, { signal: client.signal });
  await arrived;
  assert.equal((await state("web")).lifecycle_state, "starting");
  const refused = await call("POST", "/instances/web/acquire");
  assert.deepEqual([refused.status, refused.body.code], [409, "insufficient_resources"]);
  client.abort();
  await assert.rejects(left, { name: "AbortError" });
  // Its place is free once the host has seen it leave; from then on the next one waits.
  let next: ReturnType<typeof call> | undefined;
  await until("the next one may wait", async () => {
    const refused = (next = call("POST", "/instances/web/acquire")).then(() => false);
    // On a slow machine a refusal takes its time as well.
    return await Promise.race([refused, delay(2_000).then(() => true)]) &&
      await Promise.race([refused, delay(3_000).then(() => true)]);
  });
  open();
  const { status, body } = await next!;
  assert.deepEqual([status, body.started], [201, true]);
  assert.equal(host.use("lazy").stats().leases, 1);
});

test("acquire and renewals need instance:write, the list of agents instance:read", async (t) => {
  const tokens = [
    { name: "reader", token: "reader-token-0123456789", scopes: ["instance:read"] },
    { name: "writer", token: "writer-token-0123456789", scopes: ["instance:*"] },
  ];
  const { call } = await served(t, { api: { tokens } });
  const as = (name: string) => ({ headers: { Authorization: `Bearer ${name}-token-0123456789` } });
  await call("POST", "/instances", { name: "web", image: "any", lazy: { enabled: true } }, as("writer"));
  for (
    const [method, path] of [
      ["POST", "/instances/web/acquire"],
      ["POST", "/instances/web/leases/x/renew"],
      ["DELETE", "/instances/web/leases/x"],
    ]
  ) {
    assert.deepEqual((await call(method, path, undefined, as("reader"))).status, 403, path);
    assert.notEqual((await call(method, path, undefined, as("writer"))).status, 403, path);
  }
  assert.equal((await call("GET", "/agents", undefined, as("reader"))).status, 200);
  assert.equal((await call("GET", "/agents")).status, 401);
});

test("with the plugin off, its field and its routes say which plugin to turn on", async (t) => {
  const { call, create } = await served(t, { lazy: null });
  const refused = await create("web", { enabled: true });
  assert.deepEqual([refused.status, refused.body.code, refused.body.details.plugin], [400, "feature_off", "lazy"]);
  await create("web");
  for (
    const [method, path] of [
      ["POST", "/instances/web/acquire"],
      ["DELETE", "/instances/web/leases/x"],
      ["GET", "/agents"],
    ]
  ) {
    const { status, body } = await call(method, path);
    assert.deepEqual([status, body.code, body.details.plugin], [404, "feature_off", "lazy"], path);
  }
});

test("the document has the routes, and the fields of the responses", async (t) => {
  const { call } = await served(t);
  const document = (await call("GET", "/openapi.json")).body as unknown as {
    paths: Record<string, Record<string, { responses: Record<string, unknown> }>>;
    components: { schemas: Record<string, { properties: Record<string, unknown> }> };
  };
  assert.ok(document.paths["/instances/{id}/acquire"].post.responses[201]);
  assert.ok(document.paths["/instances/{id}/leases/{lease}/renew"].post.responses[200]);
  assert.ok(document.paths["/instances/{id}/leases/{lease}"].delete.responses[204]);
  assert.ok(document.paths["/agents"].get.responses[200]);
  const { Instance, LifecycleMetrics } = document.components.schemas;
  assert.ok(Instance.properties.lifecycle_state && Instance.properties.lifecycle_metrics && Instance.properties.lazy);
  assert.ok(LifecycleMetrics.properties.start_latency_ms);
});
