import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { DormouseError } from "../../main.ts";
import { bodyOf, toDormouseError } from "../../plugins/api/errors.ts";
import { apiHost } from "./support.ts";

const JSON_TYPE = { "Content-Type": "application/json" };
const BODY = { name: "web", image: "any" };

test("every refusal is { code, message, details? } with the status of its code", async (t) => {
  const { call } = await apiHost(t);
  await call("POST", "/instances", BODY);
  const sleeping = await call("POST", "/instances", { ...BODY, name: "sleeping" });
  await call("POST", "/instances/sleeping/stop");
  const cases: [string, number, string, string, unknown?, Record<string, string>?][] = [
    ["malformed JSON", 400, "malformed_json", "POST /instances", "{", JSON_TYPE],
    ["no JSON object", 400, "invalid_request", "POST /instances", "[1]", JSON_TYPE],
    ["no body", 400, "invalid_request", "POST /instances"],
    ["an empty body that is called JSON", 400, "invalid_request", "POST /instances", "", JSON_TYPE],
    ["another content type", 415, "unsupported_media_type", "POST /instances", "a=b", { "Content-Type": "text/plain" }],
    ["an unknown field", 400, "invalid_request", "POST /instances/web/exec", { comand: ["ls"] }],
    ["an unknown field of create", 400, "invalid_request", "POST /instances", { ...BODY, name: "b", imag: "x" }],
    ["a bad name", 400, "invalid_name", "POST /instances", { ...BODY, name: "-" }],
    ["a bad size", 400, "invalid_size", "POST /instances", { ...BODY, name: "b", size: "big" }],
    ["a bad ttl", 400, "invalid_ttl", "POST /instances", { ...BODY, name: "b", ttl: "soon" }],
    ["a past expiry", 400, "invalid_expires_at", "POST /instances", {
      ...BODY,
      name: "b",
      expires_at: "2000-01-01T00:00:00Z",
    }],
    ["an unknown driver", 400, "unknown_driver", "POST /instances", { ...BODY, name: "b", hypervisor: "mainframe" }],
    ["a field of a plugin that is off", 400, "feature_off", "POST /instances", {
      ...BODY,
      name: "b",
      auto_standby: { enabled: true },
    }],
    ["a bad duration", 400, "invalid_timeout", "GET /instances/web/wait?state=Running&timeout=1week"],
    ["a timeout of zero", 400, "invalid_timeout", "GET /instances/web/wait?state=Running&timeout=0s"],
    ["a negative timeout", 400, "invalid_timeout", "GET /instances/web/wait?state=Running&timeout=-5s"],
    ["a state nobody can wait for", 400, "invalid_state", "GET /instances/web/wait?state=Unknown"],
    ["no state", 400, "invalid_state", "GET /instances/web/wait"],
    ["a bad exec timeout", 400, "invalid_timeout", "POST /instances/web/exec", { command: ["ls"], timeout: "2h" }],
    ["an empty command", 400, "invalid_request", "POST /instances/web/exec", { command: [] }],
    ["a NUL in a path", 400, "invalid_request", "GET /instances/web/stat?path=%00"],
    ["no path", 400, "invalid_request", "GET /instances/web/stat"],
    ["an unknown query key", 400, "invalid_request", "GET /instances?stat=Running"],
    ["a query key where there is none", 400, "invalid_request", "GET /instances/web?verbose=true"],
    ["a query key twice", 400, "invalid_request", "GET /instances?state=Running&state=Stopped"],
    ["a wrong state to list", 400, "invalid_request", "GET /instances?state=running"],
    ["a wrong number", 400, "invalid_request", "GET /instances/web/logs?tail=-1"],
    ["a wrong flag", 400, "invalid_request", "GET /instances/web/logs?follow=yes"],
    ["a compressed standby of what cannot", 400, "feature_off", "POST /instances/web/standby", {
      compression: { enabled: true },
    }],
    ["a bad compression", 400, "invalid_snapshot_compression", "POST /instances/web/standby", {
      compression: { enabled: true, algorithm: "gzip" },
    }],
    ["a bad compression delay", 400, "invalid_compression_delay", "POST /instances/web/standby", {
      compression_delay: "later",
    }],
    ["an unknown event type", 400, "invalid_request", "GET /events?type=create,explode"],
    ["a wrong idempotency key", 400, "invalid_request", "POST /instances", BODY, { "Idempotency-Key": "a b" }],
    ["an unknown instance", 404, "not_found", "GET /instances/nobody"],
    ["events of an unknown instance", 404, "not_found", "GET /events?instance=nobody"],
    ["an unknown path", 404, "not_found", "GET /instance"],
    ["a method that is not there", 405, "method_not_allowed", "PUT /instances/web"],
    ["a name that is taken", 409, "name_conflict", "POST /instances", BODY],
    ["a state that forbids it", 409, "invalid_state", "POST /instances/sleeping/standby"],
    ["exec in what does not run", 409, "invalid_state", "POST /instances/sleeping/exec", { command: ["ls"] }],
    ["a body over 1 MiB", 413, "payload_too_large", "POST /instances", { ...BODY, image: "x".repeat(1 << 20) }],
    ["a feature no driver has", 501, "not_supported", "POST /instances", {
      ...BODY,
      name: "b",
      volumes: [{ volume_id: "v" }],
    }],
  ];
  for (const [what, status, code, request, body, headers] of cases) {
    const [method, path] = request.split(" ");
    const reply = await call(method, path, body, headers);
    assert.equal(reply.body.code, code, `${what}: ${JSON.stringify(reply.body)}`);
    assert.equal(reply.status, status, what);
    assert.match(reply.body.message, /^[A-Z].*[^.\n]$/, what);
    assert.deepEqual(Object.keys(reply.body).filter((key) => !["code", "message", "details"].includes(key)), [], what);
    assert.ok(reply.headers.get("X-Request-Id"), what);
  }
  assert.equal((await call("GET", `/instances/${sleeping.body.id}`)).status, 200);
});

test("a refusal names the field, what was expected and the nearest known one", async (t) => {
  const { call } = await apiHost(t);
  await call("POST", "/instances", BODY);
  const unknown = await call("POST", "/instances/web/exec", { comand: ["ls"] });
  assert.equal(unknown.body.message, 'Unknown field "comand" (did you mean "command"?)');
  assert.deepEqual(unknown.body.details, { field: "comand" });
  const missing = await call("POST", "/instances/web/exec", {});
  assert.match(missing.body.message, /^Missing field "command": expected /);
  const nested = await call("POST", "/instances/web/exec", { command: ["ls"], env: { A: 1 } });
  assert.equal(nested.body.message, 'Wrong value of "env.A": expected string, found 1');
  const type = await call("GET", "/events?type=standbye");
  assert.equal(type.body.message, 'Cannot filter events: type is "standbye" (did you mean "standby"?)');
});

test("a method that is not there is answered with those that are", async (t) => {
  const { call } = await apiHost(t);
  assert.equal((await call("PUT", "/instances")).headers.get("Allow"), "GET, HEAD, POST");
  // HEAD of a stream would open one that nobody reads or ends.
  const head = await call("HEAD", "/events");
  assert.equal(head.status, 405);
  assert.equal(head.headers.get("Allow"), "GET");
  assert.equal((await call("HEAD", "/instances")).status, 200);
});

test("toDormouseError() tells nothing of an unexpected error but the request's id", () => {
  const cause = new Error("password=hunter2 at /root/x.ts");
  const error = toDormouseError(cause, "req-1");
  assert.equal(error.status, 500);
  assert.equal(error.cause, cause);
  const text = JSON.stringify(bodyOf(error));
  assert.match(text, /internal_error.*req-1/);
  assert.doesNotMatch(text, /hunter2|x\.ts|stack/);
  // A code of the start-up that gets here names files of the host.
  const startup = bodyOf(new DormouseError("store_locked", "/var/lib/secret is in use"));
  assert.doesNotMatch(JSON.stringify(startup), /secret/);
});

test("an error nobody expected is a 500 with the request's id, as asked for", async (t) => {
  const { call } = await apiHost(t, {
    routes: [{
      method: "GET",
      path: "/broken",
      scope: "public",
      summary: "Breaks",
      responses: {},
      handle() {
        throw new TypeError("x is not a function");
      },
    }],
  });
  const reply = await call("GET", "/broken", undefined, { "X-Request-Id": "abc-123" });
  assert.equal(reply.status, 500);
  assert.equal(reply.body.code, "internal_error");
  assert.match(reply.body.message, /"abc-123"/);
  assert.doesNotMatch(JSON.stringify(reply.body), /not a function/);
});

test("no body, query or path makes a 5xx", { timeout: 540_000 }, async (t) => {
  const { call } = await apiHost(t);
  await call("POST", "/instances", BODY);
  const fields = ["name", "image", "cmd", "env", "tags", "size", "ttl", "expires_at", "network", "command", "timeout"];
  const keys = fc.oneof(
    fc.constantFrom(...fields, "entrypoint", "compression", "__proto__", "constructor"),
    fc.string(),
  );
  const bodies = fc.oneof(
    fc.json(),
    fc.string(),
    fc.dictionary(keys, fc.jsonValue()).map((body) => JSON.stringify(body)),
    fc.constant("[".repeat(100_000)),
    fc.constant('{"__proto__":{"name":"x"},"constructor":1}'),
  );
  const targets = fc.constantFrom(
    ["POST", "/instances"],
    ["PATCH", "/instances/web"],
    ["POST", "/instances/web/fork"],
    ["POST", "/instances/web/start"],
    ["POST", "/instances/web/standby"],
    ["POST", "/instances/web/exec"],
  );
  await fc.assert(
    fc.asyncProperty(targets, bodies, async ([method, path], body) => {
      const reply = await call(method, path, body, JSON_TYPE);
      // 501 is what the contract has for fields that no driver here has.
      assert.ok(reply.status < 500 || reply.status === 501, `${reply.status} ${JSON.stringify(reply.body)}`);
      if (reply.status >= 400) assert.equal(typeof reply.body.code, "string");
    }),
    { numRuns: 300 },
  );
  const names = fc.constantFrom(
    "state",
    "tags[a]",
    "tags[]",
    "tags",
    "tags[__proto__]",
    "__proto__",
    "a[b][c]",
    "[",
    "%",
  );
  const query = fc.array(fc.tuple(fc.oneof(names, fc.string()), fc.string()), { maxLength: 4 });
  const paths = fc.constantFrom("/instances", "/instances/web/stat", "/instances/web", "/resources", "/health");
  await fc.assert(
    fc.asyncProperty(paths, query, fc.boolean(), async (path, pairs, raw) => {
      const text = pairs.map(([key, value]) => raw ? `${key}=${value}` : `${encode(key)}=${encode(value)}`).join("&");
      const reply = await call("GET", `${path}?${text.replaceAll("#", "")}`);
      assert.ok(reply.status < 500, `${reply.status} ${JSON.stringify(reply.body)}`);
    }),
    { numRuns: 300 },
  );
  await fc.assert(
    fc.asyncProperty(fc.string({ minLength: 1 }), async (id) => {
      const reply = await call("GET", `/instances/${encode(id)}`);
      assert.ok(reply.status < 500, `${reply.status} ${JSON.stringify(reply.body)}`);
    }),
    { numRuns: 100 },
  );
});

function encode(text: string): string {
  return encodeURIComponent(text.toWellFormed());
}
