import assert from "node:assert/strict";
import { once } from "node:events";
import { request } from "node:http";
import { createServer } from "node:net";
import { test, type TestContext } from "node:test";
import { DormouseError } from "../../main.ts";
import { capturedLogs, cleanup } from "../helpers.ts";
import { metricsWorld, seriesOf } from "./world.ts";

const TOKEN = "0123456789abcdef";

/** A host with a listener of its own for the metrics, and where that is. */
async function listening(t: TestContext, table: Record<string, unknown>) {
  const logs = capturedLogs(t);
  const world = await metricsWorld(t, { table });
  const url = logs.map((line) => /Metrics on (\S+)/.exec(line)?.[1]).find((found) => found !== undefined)!;
  return { ...world, url };
}

/** With headers that fetch does not let one set. */
async function get(url: string, headers: Record<string, string> = {}, method = "GET") {
  const sent = request(url, { headers, method, agent: false });
  sent.end();
  const [response] = await once(sent, "response");
  let text = "";
  for await (const chunk of response.setEncoding("utf8")) text += chunk;
  return { status: response.statusCode as number, type: response.headers["content-type"], text };
}

test("listen serves /metrics on an address of its own, and nothing else", async (t) => {
  const { url, make, scrape } = await listening(t, { listen: "127.0.0.1:0" });
  await make("web");
  const atApi = await scrape();
  const { status, type, text } = await get(url);
  assert.deepEqual([status, type], [200, "text/plain; version=0.0.4; charset=utf-8"]);
  assert.equal(seriesOf(text)['dormouse_instances{driver="scripted",state="Running"}'], 1);
  assert.deepEqual(Object.keys(atApi).filter((name) => !(name in seriesOf(text))), [], "the API has the same");
  assert.equal((await get(url.replace("/metrics", "/instances"))).status, 404);
  assert.equal((await get(url, {}, "POST")).status, 404);
  assert.deepEqual([(await get(url, {}, "HEAD")).status, (await get(url, {}, "HEAD")).text], [200, ""]);
});

test("listen serves no page that has its own name point at loopback", async (t) => {
  const { url } = await listening(t, { listen: "127.0.0.1:0" });
  const hosts = {
    "evil.example": 403,
    "evil.example:9464": 403,
    "localhost:9464": 200,
    "127.0.0.1": 200,
    "[::1]:1": 200,
  };
  for (const [Host, status] of Object.entries(hosts)) assert.equal((await get(url, { Host })).status, status, Host);
});

test("listen asks for the token where there is one, whatever the host is called", async (t) => {
  const { url } = await listening(t, { listen: "127.0.0.1:0", token: TOKEN });
  const status = async (Authorization?: string) =>
    (await get(url, { Host: "metrics.example", ...(Authorization && { Authorization }) })).status;
  assert.equal(await status(), 401);
  assert.equal(await status(`Bearer ${TOKEN.slice(0, -1)}x`), 401);
  assert.equal(await status(`Bearer ${TOKEN}`), 200);
});

test("listen refuses what is open to others without a token, and tells every mistake without the token", async (t) => {
  const refused: [Record<string, unknown>, RegExp][] = [
    [
      { listen: "0.0.0.0:9464" },
      /metrics\.listen: an address that is not loopback needs a token, found "0\.0\.0\.0:9464"/,
    ],
    [{ listen: "[::]:9464" }, /metrics\.listen: an address that is not loopback needs a token/],
    [{ listen: "unix:/run/metrics" }, /metrics\.listen: expected an address such as 127\.0\.0\.1:9464/],
    [{ listen: "9464" }, /metrics\.listen: expected an address such as 127\.0\.0\.1:9464/],
    [{ listen: "127.0.0.1:0", token: "short-secret" }, /metrics\.token: expected at least 16 characters/],
    [{ instance_label_budget: -1 }, /metrics\.instance_label_budget: /],
    [{ stats_max_age: "soon" }, /metrics\.stats_max_age: expected a duration/],
    [{ listn: "x" }, /metrics\.listn: unknown key \(did you mean "listen"\?\)/],
  ];
  for (const [table, message] of refused) {
    await assert.rejects(metricsWorld(t, { table }), (error: unknown) => {
      assert.ok(error instanceof DormouseError && error.code === "config_invalid");
      assert.match(error.message, message);
      assert.ok(!error.message.includes("short-secret"));
      return true;
    });
  }
});

test("listen says why it cannot, and the start-up ends", async (t) => {
  const server = createServer().listen(0, "127.0.0.1");
  await once(server, "listening");
  cleanup(t).defer(() => void server.close());
  const { port } = server.address() as { port: number };
  await assert.rejects(metricsWorld(t, { table: { listen: `127.0.0.1:${port}` } }), (error: unknown) => {
    assert.ok(error instanceof DormouseError && error.code === "plugin_failed", String(error));
    assert.match(error.message, new RegExp(`^Cannot listen on "127\\.0\\.0\\.1:${port}": `));
    return true;
  });
});

test("closing the host closes the listener, also while a client keeps its connection", async (t) => {
  const { url, host } = await listening(t, { listen: "127.0.0.1:0" });
  await (await fetch(url)).text();
  await host.close();
  await assert.rejects(fetch(url));
});
