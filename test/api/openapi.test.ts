import assert from "node:assert/strict";
import { test } from "node:test";
import { Validator } from "@seriousme/openapi-schema-validator";
import * as v from "valibot";
import { definePlugin, type Plugin } from "../../main.ts";
import apiPlugin from "../../plugins/api/mod.ts";
import conntrackPlugin from "../../plugins/conntrack/mod.ts";
import standbyPlugin from "../../plugins/conntrack-standby/mod.ts";
import healthPlugin from "../../plugins/health/mod.ts";
import hypervisorPlugin from "../../plugins/hypervisor/mod.ts";
import journalPlugin from "../../plugins/journal/mod.ts";
import lazyPlugin from "../../plugins/lazy/mod.ts";
import qemuPlugin from "../../plugins/qemu/mod.ts";
import restartPlugin from "../../plugins/restart/mod.ts";
import storePlugin from "../../plugins/store.ts";
import wakePlugin from "../../plugins/wake/mod.ts";
import { startWith } from "../helpers.ts";
import { apiHost } from "./support.ts";

interface Operation {
  parameters?: {
    name: string;
    in: string;
    description?: string;
    schema: Record<string, unknown>;
    style?: string;
    required?: boolean;
  }[];
  requestBody?: { required?: boolean; content: Record<string, { schema: { $ref?: string } }> };
  responses: Record<string, { content?: Record<string, { schema: { $ref?: string } }> }>;
  security?: unknown[];
}
interface Described {
  description?: string;
  $ref?: string;
  properties?: Record<string, Described>;
  anyOf?: Described[];
  items?: Described;
}
interface Document {
  openapi: string;
  paths: Record<string, Record<string, Operation>>;
  components: { schemas: Record<string, Described & { required?: string[] }> };
}

test("/openapi.json is valid OpenAPI 3.1 and has every route", async (t) => {
  const { call } = await apiHost(t);
  const reply = await call("GET", "/openapi.json");
  const result = await new Validator().validate(structuredClone(reply.body) as Record<string, unknown>);
  assert.deepEqual([result.valid, result.errors], [true, undefined]);
  const document = reply.body as unknown as Document;
  assert.equal(document.openapi, "3.1.0");
  const operations = Object.entries(document.paths).flatMap(([path, item]) =>
    Object.keys(item).map((method) => `${method.toUpperCase()} ${path}`)
  );
  assert.deepEqual(operations.toSorted(), [
    "DELETE /instances/{id}",
    "GET /capabilities",
    "GET /docs",
    "GET /events",
    "GET /health",
    "GET /instances",
    "GET /instances/{id}",
    "GET /instances/{id}/logs",
    "GET /instances/{id}/stat",
    "GET /instances/{id}/stats",
    "GET /instances/{id}/wait",
    "GET /openapi.json",
    "GET /resources",
    "PATCH /instances/{id}",
    "POST /instances",
    "POST /instances/{id}/exec",
    "POST /instances/{id}/fork",
    "POST /instances/{id}/pause",
    "POST /instances/{id}/restore",
    "POST /instances/{id}/resume",
    "POST /instances/{id}/standby",
    "POST /instances/{id}/start",
    "POST /instances/{id}/stop",
  ]);
});

test("/openapi.json says what requests and answers hold", async (t) => {
  const { call } = await apiHost(t);
  const { paths, components } = (await call("GET", "/openapi.json")).body as unknown as Document;
  const create = paths["/instances"].post;
  const json = "application/json";
  assert.equal(create.requestBody!.content[json].schema.$ref, "#/components/schemas/CreateInstanceRequest");
  assert.equal(create.requestBody!.required, true);
  assert.equal(create.responses["201"].content![json].schema.$ref, "#/components/schemas/Instance");
  assert.equal(create.responses.default.content![json].schema.$ref, "#/components/schemas/Error");
  assert.deepEqual(create.security, [{ bearer: [] }]);
  assert.equal(paths["/health"].get.security, undefined);
  assert.equal(paths["/instances/{id}/standby"].post.requestBody!.required, false);
  assert.deepEqual(Object.keys(paths["/instances/{id}/logs"].get.responses["200"].content!), ["text/event-stream"]);
  const named = (path: string, name: string) =>
    paths[path].get.parameters!.find((parameter) => parameter.name === name)!;
  assert.equal(named("/instances", "tags").style, "deepObject");
  assert.equal(named("/instances/{id}/logs", "follow").schema.type, "boolean");
  assert.equal(named("/instances/{id}/logs", "tail").schema.type, "integer");
  assert.equal(named("/instances/{id}/wait", "state").required, true);
  assert.equal(named("/instances/{id}/wait", "id").in, "path");
  assert.deepEqual(components.schemas.Error.required, ["code", "message"]);
});

test("/openapi.json has the fields and routes that plugins add", async (t) => {
  const nap = definePlugin({
    name: "nap",
    requires: ["hypervisor", "api"],
    setup(host) {
      host.use("hypervisor").extend({
        field: "nap",
        schema: v.object({ after: v.string() }),
        presented: { nap_status: v.string() },
      });
      host.use("api").route({
        method: "GET",
        path: "/naps/:id",
        scope: "nap:read",
        summary: "A nap",
        responses: { 200: { description: "It", schema: v.object({ left: v.number() }) } },
        handle: () => ({ status: 200, body: { left: 1 } }),
      });
    },
  });
  // Set up after the API, as a plugin that comes later in the config may be.
  const host = await startWith(t, [storePlugin, hypervisorPlugin, apiPlugin, nap] as Plugin[], {
    tables: { api: { listen: "127.0.0.1:0", access_log: false } },
  });
  const { url } = host.use("api");
  const { paths, components } = await (await fetch(`${url}/openapi.json`)).json() as Document;
  assert.ok("nap" in components.schemas.CreateInstanceRequest.properties!);
  assert.ok("nap" in components.schemas.UpdateInstanceRequest.properties!);
  assert.ok("nap_status" in components.schemas.Instance.properties!);
  assert.ok(paths["/naps/{id}"].get);
  assert.deepEqual(await (await fetch(`${url}/naps/x`)).json(), { left: 1 });
});

test("/openapi.json says of every field and parameter of a request what it is for", async (t) => {
  const features = [qemuPlugin, conntrackPlugin, standbyPlugin, wakePlugin, healthPlugin, restartPlugin, lazyPlugin];
  const plugins = [storePlugin, hypervisorPlugin, apiPlugin, journalPlugin, ...features] as Plugin[];
  const host = await startWith(t, plugins, { tables: { api: { listen: "127.0.0.1:0", access_log: false } } });
  const { paths, components } = await (await fetch(`${host.use("api").url}/openapi.json`)).json() as Document;
  const silent = ({ $ref, ...own }: Described, path: string): string[] => {
    const schema: Described = $ref ? components.schemas[$ref.split("/").at(-1)!] : own;
    const either = [schema, ...schema.anyOf ?? []];
    const inside = either.flatMap(({ properties = {}, items }) => [
      ...Object.entries(properties).flatMap(([key, value]) => silent(value, `${path}.${key}`)),
      ...items ? silent(items, `${path}[]`).filter((each) => each !== `${path}[]`) : [],
    ]);
    return either.some(({ description }) => description) ? inside : [path, ...inside];
  };
  const found = Object.entries(paths).flatMap(([path, item]) =>
    Object.entries(item).flatMap(([method, { parameters = [], requestBody }]) => {
      const route = `${method} ${path}`;
      const { schema } = requestBody?.content["application/json"] ?? {};
      const query = parameters.filter(({ in: where }) => where === "query");
      return [
        ...query.filter((each) => !each.description).map(({ name }) => `${route}?${name}`),
        ...schema ? silent(schema, route).filter((each) => each !== route) : [],
      ];
    })
  );
  assert.deepEqual(found, []);
  const { post } = paths["/instances/{id}/start"];
  assert.match(post.parameters!.find(({ name }) => name === "id")!.description!, /its name/);
});

test("/docs is one page that asks nobody else for anything", async (t) => {
  const { url } = await apiHost(t);
  const response = await fetch(`${url}/docs`);
  assert.equal(response.headers.get("Content-Type"), "text/html; charset=utf-8");
  const policy = response.headers.get("Content-Security-Policy")!;
  assert.match(policy, /^default-src 'none'; connect-src 'self'/);
  const page = await response.text();
  assert.doesNotMatch(page, /https?:|\/\/[a-z]|src=|@import|url\(/i);
  assert.match(page, /fetch\("\.\/openapi\.json"\)/);
  // The script parses, and is the one that the policy allows.
  const [, script] = /<script>([\s\S]*)<\/script>/.exec(page)!;
  assert.doesNotThrow(() => new Function(script));
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", new TextEncoder().encode(script)));
  assert.ok(policy.includes(btoa(String.fromCharCode(...digest))));
});
