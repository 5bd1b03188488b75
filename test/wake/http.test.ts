import assert from "node:assert/strict";
import { once } from "node:events";
import { createServer, type IncomingMessage, request, type RequestListener, type RequestOptions } from "node:http";
import type { Socket } from "node:net";
import { test, type TestContext } from "node:test";
import { until } from "../helpers.ts";
import { gate, ORIGIN } from "../hypervisor/scripted.ts";
import { open, rest, talk, wakeWorld } from "./world.ts";

/** A host that routes by Host, with one instance "app.test" whose HTTP server is `handler`. */
async function routed(t: TestContext, handler: RequestListener, table: Record<string, unknown> = {}) {
  const world = await wakeWorld(t, { table: { http_listen: "127.0.0.1:0", ...table } });
  const server = createServer(handler);
  world.driver.serve = (socket) => void server.emit("connection", socket);
  const made = await world.make("app", { hosts: ["app.test"] });
  const router = Number(new URL(world.wake.url!).port);
  return { ...world, ...made, server, router };
}

/** One request; its whole answer. */
async function ask(port: number, options: RequestOptions, body?: string) {
  const outgoing = request({ host: "127.0.0.1", port, agent: false, ...options });
  outgoing.end(body);
  const [incoming] = (await once(outgoing, "response")) as [IncomingMessage];
  let text = "";
  for await (const chunk of incoming) text += chunk;
  return { status: incoming.statusCode, headers: incoming.headers, raw: incoming.rawHeaders, text };
}

const HOST = { host: "app.test" };

test("a request wakes the instance that lists its host, and is answered", async (t) => {
  const { hypervisor, id, router, events } = await routed(t, (incoming, response) => {
    let text = "";
    incoming.on("data", (chunk) => text += chunk).on("end", () => {
      response.writeHead(201, ["Set-Cookie", "a=1", "Set-Cookie", "b=2", "Connection", "close, X-Hop", "X-Hop", "1"]);
      response.end(`${incoming.method} ${incoming.url} ${text}`);
    });
  });
  for (const host of ["app.test", "APP.test:8080", "app.test."]) {
    await hypervisor.standby(id, ORIGIN);
    const answer = await ask(router, { method: "POST", path: "/a?b=c", headers: { host } }, "body");
    assert.equal(answer.status, 201);
    assert.equal(answer.text, "POST /a?b=c body");
    assert.deepEqual(answer.headers["set-cookie"], ["a=1", "b=2"]);
    assert.equal(answer.headers["x-hop"], undefined);
  }
  const causes = events.filter(({ action }) => action === "restore").map(({ actor, cause }) => `${actor} ${cause}`);
  assert.deepEqual(causes, ["wake http", "wake http", "wake http"]);
});

// W7, W17: only what is listed wakes, and what is refused is counted.
test("a request for a host that nobody lists is 404 and starts nothing", async (t) => {
  const { hypervisor, id, router, driver, wake } = await routed(t, (_, response) => void response.end());
  await hypervisor.standby(id, ORIGIN);
  for (const host of ["other.test", "app.test.evil", "127.0.0.1", ""]) {
    assert.equal((await ask(router, { headers: { host } })).status, 404, host);
  }
  assert.equal(driver.calls.includes("restore"), false);
  assert.equal(wake.stats().unknown_hosts, 4);
});

// W14: appended, not overwritten.
test("the instance is told who asked for what, after what others said", async (t) => {
  const { router } = await routed(t, ({ headers, rawHeaders }, response) => {
    response.end(JSON.stringify({ headers, names: rawHeaders.filter((_, i) => i % 2 === 0) }));
  });
  const told = async (headers: Record<string, string>) =>
    JSON.parse((await ask(router, { headers: { ...HOST, ...headers } })).text).headers;
  const plain = await told({
    "X-Mine": "kept",
    Connection: "X-Secret, Host",
    "X-Secret": "1",
    "Keep-Alive": "timeout=5",
  });
  assert.equal(plain.host, "app.test");
  assert.equal(plain["x-mine"], "kept");
  assert.equal(plain["x-secret"], undefined);
  assert.equal(plain["keep-alive"], undefined);
  const forwarded = (headers: Record<string, string>) =>
    ["for", "host", "proto"].map((key) => headers[`x-forwarded-${key}`]);
  assert.deepEqual(forwarded(plain), ["127.0.0.1", "app.test", "http"]);
  const chain = { "X-Forwarded-For": "192.0.2.7", "X-Forwarded-Proto": "https", "X-Forwarded-Host": "www.test" };
  assert.deepEqual(forwarded(await told(chain)), ["192.0.2.7, 127.0.0.1", "www.test", "https"]);
});

// W2, W3.
test("50 first requests at once are answered after one restore", async (t) => {
  const { hypervisor, id, router, driver } = await routed(t, ({ url }, response) => void response.end(url));
  await hypervisor.standby(id, ORIGIN);
  const answers = await Promise.all(
    Array.from({ length: 50 }, (_, n) => ask(router, { path: `/${n}`, headers: HOST })),
  );
  assert.deepEqual(answers.map(({ status, text }) => `${status} ${text}`), answers.map((_, n) => `200 /${n}`));
  assert.equal(driver.calls.filter((call) => call === "restore").length, 1);
});

test("a stream passes as it comes, and ends upstream when the client leaves", async (t) => {
  const gone = Promise.withResolvers<void>();
  const { router } = await routed(t, (_, response) => {
    response.writeHead(200, { "Content-Type": "text/event-stream" });
    response.write("data: 1\n\n");
    response.on("close", gone.resolve);
  });
  const outgoing = request({ host: "127.0.0.1", port: router, headers: HOST, agent: false }).on("error", () => {});
  outgoing.end();
  const [incoming] = (await once(outgoing, "response")) as [IncomingMessage];
  const [first] = await once(incoming, "data");
  assert.equal(String(first), "data: 1\n\n");
  incoming.on("error", () => {});
  outgoing.destroy();
  await gone.promise;
});

test("a body of unknown length passes both ways, whatever the method", async (t) => {
  const { router } = await routed(t, (incoming, response) => void incoming.pipe(response));
  for (const method of ["POST", "GET", "DELETE"]) {
    const headers = { ...HOST, "Transfer-Encoding": "chunked" };
    const text = method.repeat(100_000);
    assert.equal((await ask(router, { method, headers }, text)).text, text, method);
  }
});

test("a WebSocket is joined with the instance after the wake, and a refused one is told", async (t) => {
  const { hypervisor, id, router, server } = await routed(t, (_, response) => {
    response.writeHead(403, { "X-Why": "no" }).end("go away");
  });
  server.on("upgrade", (incoming: IncomingMessage, socket: Socket, head: Uint8Array) => {
    assert.equal(incoming.headers["x-forwarded-for"], "127.0.0.1");
    socket.write("HTTP/1.1 101 Switching Protocols\r\nUpgrade: echo\r\nConnection: Upgrade\r\nX-Own: 1\r\n\r\nhi ");
    socket.write(head);
    socket.pipe(socket);
  });
  await hypervisor.standby(id, ORIGIN);
  const client = await open(t, router);
  client.write("GET /ws HTTP/1.1\r\nHost: app.test\r\nUpgrade: echo\r\nConnection: Upgrade\r\n\r\nearly ");
  let text = "";
  client.on("data", (chunk) => text += chunk);
  await until("it answers", () => text.endsWith("hi early "));
  assert.match(text, /^HTTP\/1\.1 101 Switching Protocols\r\n(.*\r\n)*X-Own: 1\r\n/);
  client.end("late");
  await once(client, "end");
  assert.match(text, /late$/);
  server.removeAllListeners("upgrade");
  const wish = "GET / HTTP/1.1\r\nHost: app.test\r\nUpgrade: echo\r\nConnection: Upgrade\r\n\r\n";
  const refused = await open(t, router);
  refused.write(wish);
  const answer = await rest(refused);
  assert.match(answer, /^HTTP\/1\.1 403 Forbidden\r\n(.*\r\n)*X-Why: no\r\n/);
  assert.match(answer, /\r\n\r\ngo away$/);
  assert.match(await talk(router, wish.replace("app.test", "other.test")), /^HTTP\/1\.1 404 /);
});

// W13, W14, W17: statuses of their own, nothing of the reason, and nothing sent twice.
test("a wake that fails is 503, one that is late 504, and an instance that breaks 502", async (t) => {
  let requests = 0;
  const { hypervisor, id, router, driver } = await routed(t, (incoming) => {
    requests++;
    incoming.socket.destroy();
  });
  const broken = await ask(router, { method: "POST", headers: HOST }, "once");
  assert.equal(broken.status, 502);
  assert.equal(requests, 1);
  const up = driver.script.restore!;
  await hypervisor.update(id, { wake: { hosts: ["app.test"], http_port: 1, timeout: "200ms" } }, ORIGIN);
  await hypervisor.standby(id, ORIGIN);
  const late = await ask(router, { headers: HOST });
  assert.equal(late.status, 504);
  await hypervisor.standby(id, ORIGIN);
  driver.script.restore = () => Promise.reject(new Error("secret reason"));
  const failed = await ask(router, { headers: HOST });
  assert.equal(failed.status, 503);
  assert.equal(failed.headers["retry-after"], "1");
  assert.doesNotMatch(failed.text, /secret|app/);
  driver.script.restore = up;
});

test("requests past the bounds are 503 at once", async (t) => {
  const { hypervisor, id, router, driver, wake } = await routed(
    t,
    (_, response) => void response.end("ok"),
    { max_held_per_instance: 1 },
  );
  await hypervisor.standby(id, ORIGIN);
  const { open: pass, script } = gate();
  const up = driver.script.restore!;
  driver.script.restore = async (instance, signal) => (await script(instance, signal), await up(instance, signal));
  const first = ask(router, { headers: HOST });
  await until("one waits", () => wake.stats().held === 1);
  assert.equal((await ask(router, { headers: HOST })).status, 503);
  pass();
  assert.equal((await first).text, "ok");
});
