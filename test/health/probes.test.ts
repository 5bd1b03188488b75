import assert from "node:assert/strict";
import { once } from "node:events";
import { createServer as createHttp, type RequestListener, type Server as HttpServer } from "node:http";
import { createServer as createHttps } from "node:https";
import { type AddressInfo, createServer, type Server, type Socket } from "node:net";
import { describe, it, type TestContext } from "node:test";
import { PROBE_PORTS } from "../../plugins/shared/probe-ports.ts";
import { systemClock } from "../../plugins/shared/clock.ts";
import { cleanup } from "../helpers.ts";
import { world } from "./world.ts";

// Of nobody: made for this test, for localhost, until 2126.
const KEY = `-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgjGql2mWTQjB+HfE4
EWhQD8VP0rbOJNLcnxIi+li2Zu+hRANCAARd7acz9k4s8Tr8iOHdL3jzL77Lr+e7
F477pUZPnWakGR7Zx0qEJ+xiZXLsdbPABI20pxkMZqrJ+l7pM9fX7U/P
-----END PRIVATE KEY-----
`;
const CERTIFICATE = `-----BEGIN CERTIFICATE-----
MIIBmzCCAUGgAwIBAgIUbHycJfbM29MgJcNJK7GNWf7D498wCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyMjIyMjQyMFoYDzIxMjYxMDI5
MjIyNDIwWjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAARd7acz9k4s8Tr8iOHdL3jzL77Lr+e7F477pUZPnWakGR7Zx0qEJ+xi
ZXLsdbPABI20pxkMZqrJ+l7pM9fX7U/Po28wbTAdBgNVHQ4EFgQUwPM9XRjPonH2
ulP5oQsNFxYP0FAwHwYDVR0jBBgwFoAUwPM9XRjPonH2ulP5oQsNFxYP0FAwDwYD
VR0TAQH/BAUwAwEB/zAaBgNVHREEEzARhwR/AAABgglsb2NhbGhvc3QwCgYIKoZI
zj0EAwIDSAAwRQIhAJG/38GC989Wp3krccDu0D+Ezu1WLiNOYV8sPsWidCV6AiA6
/txMjNp/vE/hp20cpXDzxYD7xteDfhyTY7VbcNdmSg==
-----END CERTIFICATE-----
`;

/** The port of a server that runs until the test ends. */
async function listening(t: TestContext, server: Server | HttpServer): Promise<number> {
  const sockets = new Set<Socket>();
  server.on("connection", (socket: Socket) => {
    sockets.add(socket);
    socket.on("error", () => socket.destroy());
    socket.once("close", () => sockets.delete(socket));
  });
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  cleanup(t).defer(async () => {
    const closed = once(server, "close");
    server.close();
    for (const socket of sockets) socket.destroy();
    await closed;
  });
  return (server.address() as AddressInfo).port;
}

/** The first result of a check, as the API shows it: null for a success, else its error. */
async function result(t: TestContext, health_check: Record<string, unknown>): Promise<unknown> {
  const { make, probe, status, host } = await world(t, { clock: systemClock });
  const probed = probe();
  const { id } = await make("web", { exec: undefined, timeout: "5s", ...health_check });
  const { ok } = await probed;
  const { last_error, last_success_at } = status(id);
  assert.equal(ok, last_success_at !== null);
  await host.close();
  return last_error;
}

const http = (port: number, more: Record<string, unknown> = {}) => ({ http: { port, ...more } });

describe("an http probe", () => {
  it("passes with the status and the body that are expected", async (t) => {
    const seen: string[] = [];
    const port = await listening(
      t,
      createHttp(({ method, url, headers, socket }, response) => {
        seen.push(`${method} ${url} ${headers.host} ${headers.connection} ${headers["user-agent"]?.split("/")[0]}`);
        assert.ok(socket.remotePort! >= PROBE_PORTS.first && socket.remotePort! <= PROBE_PORTS.last);
        response.writeHead(url === "/up?x=1" ? 204 : 200).end(url === "/up?x=1" ? undefined : "I am ready");
      }),
    );
    assert.equal(await result(t, http(port)), null);
    assert.equal(await result(t, http(port, { path: "/up?x=1", expected_status: 204 })), null);
    assert.equal(await result(t, http(port, { expected_body: "am ready" })), null);
    const host = `127.0.0.1:${port} close Dormouse`;
    assert.deepEqual(seen, [`GET / ${host}`, `GET /up?x=1 ${host}`, `GET / ${host}`]);
  });

  it("fails with any other status, and follows no redirect", async (t) => {
    const seen: string[] = [];
    const answer: RequestListener = ({ url }, response) => {
      seen.push(url!);
      response.writeHead(url === "/" ? 302 : 503, { location: "/elsewhere" }).end();
    };
    const port = await listening(t, createHttp(answer));
    const place = `GET http://127.0.0.1:${port}`;
    assert.equal(await result(t, http(port, { path: "/no" })), `${place}/no: status is 503, expected 200`);
    assert.equal(await result(t, http(port)), `${place}/: status is 302, expected 200`);
    assert.equal(await result(t, http(port, { expected_status: 302 })), null);
    assert.deepEqual(seen, ["/no", "/", "/"]);
  });

  it("finds the expected body across parts, in an answer that never ends, and in its first 64 KiB only", async (t) => {
    const answer: RequestListener = ({ url }, response) => {
      if (url === "/far") return void response.end(`${"x".repeat(64 * 1024)}ready`);
      if (url === "/edge") return void response.end(`${"x".repeat(64 * 1024 - 5)}ready`);
      if (url === "/flood") {
        const flood = () => {
          while (!response.destroyed && response.write("y".repeat(16 * 1024)));
        };
        response.on("drain", flood);
        return flood();
      }
      response.write("I am rea");
      setTimeout(() => response.write("dy €"), 20);
    };
    const port = await listening(t, createHttp(answer));
    const missing = (path: string) => `GET http://127.0.0.1:${port}${path}: the expected body is not there`;
    const expecting = (path: string, expected_body = "ready") => result(t, http(port, { path, expected_body }));
    assert.equal(await expecting("/endless"), null);
    assert.equal(await expecting("/endless", "€"), null);
    assert.equal(await expecting("/edge"), null);
    assert.equal(await expecting("/far"), missing("/far"));
    assert.equal(await expecting("/flood"), missing("/flood"));
  });

  it("fails where nobody listens, where it is no HTTP, and where it breaks off", async (t) => {
    const server = createServer();
    const closed = await listening(t, server);
    server.close();
    await once(server, "close");
    server.listen(0); // for the end of the test
    assert.equal(await result(t, http(closed)), `Cannot connect to 127.0.0.1:${closed}: ECONNREFUSED`);

    const babble = await listening(t, createServer((socket) => void socket.write("220 mail.example.test\r\n")));
    assert.match(String(await result(t, http(babble))), new RegExp(`^GET http://127.0.0.1:${babble}/: .`));
    const short = createServer((socket) => {
      socket.write("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf");
      setTimeout(() => socket.destroy(), 20);
    });
    const port = await listening(t, short);
    assert.match(String(await result(t, http(port, { expected_body: "whole" }))), /^GET .*: ./);
    assert.equal(await result(t, http(port)), null, "nobody asked for the body");
  });

  it("fails at its timeout, wherever the answer stops", async (t) => {
    const timing = { interval: "200ms", timeout: "200ms" };
    const silent = await listening(t, createServer(() => {}));
    assert.equal(await result(t, { ...timing, ...http(silent) }), "No answer within 200ms");
    const slow = createServer((socket) => void socket.write("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nha"));
    const port = await listening(t, slow);
    assert.equal(await result(t, { ...timing, ...http(port, { expected_body: "half" }) }), "No answer within 200ms");
    assert.equal(await result(t, { ...timing, ...http(silent, { scheme: "https" }) }), "No answer within 200ms");
  });

  it("takes an upgrade for the answer that it is", async (t) => {
    const switching = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n";
    const port = await listening(t, createServer((socket) => void socket.write(switching)));
    assert.match(String(await result(t, http(port))), /status is 101, expected 200$/);
    assert.equal(await result(t, http(port, { expected_status: 101 })), null);
  });

  it("verifies a certificate, unless it is told not to", async (t) => {
    const server = createHttps({ key: KEY, cert: CERTIFICATE }, (_, response) => void response.end("secret"));
    const port = await listening(t, server);
    const https = (more: Record<string, unknown>) => result(t, http(port, { scheme: "https", ...more }));
    assert.match(String(await https({})), new RegExp(`^GET https://127.0.0.1:${port}/: .*certificate`));
    assert.equal(await https({ tls_verify: false }), null);
    assert.equal(await https({ tls_verify: false, expected_body: "secret" }), null);
    const plain = await listening(t, createHttp((_, response) => void response.end()));
    assert.match(String(await result(t, http(plain, { scheme: "https", tls_verify: false }))), /^GET https:/);
  });
});

describe("a tcp probe", () => {
  it("passes where somebody listens, and leaves no connection behind", async (t) => {
    const ended = Promise.withResolvers<void>();
    const port = await listening(
      t,
      createServer((socket) => {
        assert.ok(socket.remotePort! >= PROBE_PORTS.first && socket.remotePort! <= PROBE_PORTS.last);
        socket.once("close", () => ended.resolve());
        socket.resume();
      }),
    );
    assert.equal(await result(t, { tcp: { port } }), null);
    await ended.promise;
  });

  it("fails where nobody does", async (t) => {
    const server = createServer();
    const port = await listening(t, server);
    server.close();
    await once(server, "close");
    server.listen(0);
    assert.equal(await result(t, { tcp: { port } }), `Cannot connect to 127.0.0.1:${port}: ECONNREFUSED`);
  });
});
