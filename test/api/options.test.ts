import assert from "node:assert/strict";
import { test } from "node:test";
import { DormouseError } from "../../main.ts";
import { isLocal, parseListen } from "../../plugins/shared/listen.ts";
import { apiHost } from "./support.ts";

const TOKEN = { name: "ops", token: "0123456789abcdef" };

test("parseListen() takes addresses and socket files and nothing else", () => {
  const cases: [string, ReturnType<typeof parseListen>][] = [
    ["127.0.0.1:8080", { hostname: "127.0.0.1", port: 8080 }],
    ["localhost:0", { hostname: "127.0.0.1", port: 0 }],
    ["[::1]:8080", { hostname: "::1", port: 8080 }],
    ["0.0.0.0:65535", { hostname: "0.0.0.0", port: 65535 }],
    ["unix:/run/dormouse.sock", { path: "/run/dormouse.sock" }],
    ["unix:run.sock", undefined],
    ["127.0.0.1", undefined],
    ["127.0.0.1:65536", undefined],
    ["127.1:80", undefined],
    [":8080", undefined],
    ["::1:8080", undefined],
    ["[127.0.0.1]:8080", undefined],
    ["example.com:80", undefined],
    ["http://127.0.0.1:8080", undefined],
  ];
  for (const [text, expected] of cases) assert.deepEqual(parseListen(text), expected, text);
});

test("isLocal() holds for what only this machine reaches", () => {
  for (const text of ["127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "[::ffff:127.0.0.1]:1", "unix:/x"]) {
    assert.ok(isLocal(parseListen(text)!), text);
  }
  for (const text of ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "192.168.0.1:1", "[fe80::1]:1", "[::ffff:10.0.0.1]:1"]) {
    assert.ok(!isLocal(parseListen(text)!), text);
  }
});

test("the host does not start with options that are wrong, and says which", async (t) => {
  const cases: [Record<string, unknown>, RegExp][] = [
    [{ listen: "0.0.0.0:0" }, /plugins\.api\.listen: .*needs \[\[plugins\.api\.tokens\]\]/],
    [{ listen: "[::]:0", tokens: [] }, /plugins\.api\.listen: .*needs \[\[plugins\.api\.tokens\]\]/],
    [{ listen: "8080" }, /plugins\.api\.listen: expected an address such as 127\.0\.0\.1:8080/],
    [{ request_timeout: "0s" }, /plugins\.api\.request_timeout/],
    [{ tokens: [{ ...TOKEN, token: "short" }] }, /plugins\.api\.tokens\.0\.token: expected at least 16/],
    [{ tokens: [{ ...TOKEN, token: "with spaces in between" }] }, /plugins\.api\.tokens\.0\.token/],
    [{ tokens: [{ ...TOKEN, scopes: ["instances"] }] }, /plugins\.api\.tokens\.0\.scopes\.0/],
    [{ tokens: [TOKEN, TOKEN] }, /plugins\.api\.tokens: expected each name once/],
    [{ tokens: [{ ...TOKEN, scope: ["*"] }] }, /plugins\.api\.tokens\.0\.scope: unknown key/],
    [{ port: 1 }, /plugins\.api\.port: unknown key/],
  ];
  for (const [table, expected] of cases) {
    await assert.rejects(apiHost(t, { table }), (error) => {
      assert.ok(error instanceof DormouseError && error.code === "config_invalid", String(error));
      assert.match(error.message, expected);
      // What is wrong about a token must not put it into a log.
      assert.doesNotMatch(error.message, /0123456789abcdef/);
      return true;
    }, JSON.stringify(table));
  }
});

test("tokens are asked for on loopback too where there are any", async (t) => {
  const { call } = await apiHost(t, { table: { tokens: [TOKEN] } });
  assert.equal((await call("GET", "/instances")).status, 401);
  assert.equal((await call("GET", "/instances", undefined, { Authorization: `Bearer ${TOKEN.token}` })).status, 200);
  assert.equal((await call("GET", "/health")).status, 200);
});

test("an address beyond loopback is fine with tokens", async (t) => {
  const { host } = await apiHost(t, { table: { listen: "0.0.0.0:0", tokens: [TOKEN] } });
  assert.match(host.use("api").url, /^http:\/\/0\.0\.0\.0:\d+$/);
});
