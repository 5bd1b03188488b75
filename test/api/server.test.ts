import assert from "node:assert/strict";
import { renameSync, statSync, writeFileSync } from "node:fs";
import { request } from "node:http";
import { createServer } from "node:net";
import { networkInterfaces } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { test, type TestContext } from "node:test";
import { execa } from "execa";
import { DormouseError } from "../../main.ts";
import type { Listen } from "../../plugins/shared/listen.ts";
import { listen } from "../../plugins/api/server.ts";
import { cleanup, lacking, temporaryFolder } from "../helpers.ts";
import { apiHost } from "./support.ts";

const hello = () => new Response("hello");
const LOCAL: Listen = { hostname: "127.0.0.1", port: 0 };

async function server(t: TestContext, fetch: Parameters<typeof listen>[0], address: Listen = LOCAL) {
  const made = await listen(fetch, address);
  cleanup(t).defer(() => made.close(0));
  return made;
}

function overSocket(socketPath: string): Promise<string> {
  return new Promise((resolve, reject) => {
    const sent = request({ socketPath, path: "/", agent: false }, async (response) => {
      let text = "";
      for await (const chunk of response) text += chunk;
      resolve(text);
    });
    sent.on("error", reject).end();
  });
}

test("listen() serves on a free port and says where", async (t) => {
  const four = await server(t, hello);
  assert.match(four.url, /^http:\/\/127\.0\.0\.1:\d+$/);
  assert.equal(await (await fetch(four.url)).text(), "hello");
});

test("listen() refuses an address in use", async (t) => {
  const first = await server(t, hello);
  const port = Number(new URL(first.url).port);
  await assert.rejects(listen(hello, { ...LOCAL, port }), /in use/i);
  await assert.rejects(apiHost(t, { table: { listen: `127.0.0.1:${port}` } }), (error) => {
    assert.ok(error instanceof DormouseError);
    assert.match(error.message, new RegExp(`Cannot listen on "127.0.0.1:${port}": .*in use`, "i"));
    return true;
  });
});

test("listen() makes a socket file that only its user can reach", async (t) => {
  const path = join(temporaryFolder(t), "api.sock");
  const before = process.umask();
  const { url } = await server(t, hello, { path });
  assert.equal(url, `unix:${path}`);
  assert.equal(statSync(path).mode & 0o777, 0o600);
  assert.equal(process.umask(), before);
  assert.equal(await overSocket(path), "hello");
});

test("listen() takes over the socket file of a host that died, and no other file", async (t) => {
  const folder = temporaryFolder(t);
  const stale = join(folder, "stale.sock");
  const dying = createServer();
  await new Promise<void>((resolve) => dying.listen(`${stale}.new`, resolve));
  // Under another name it stays when its server is gone, as it does when that is killed.
  renameSync(`${stale}.new`, stale);
  await new Promise<void>((resolve) => dying.close(() => resolve()));
  await server(t, hello, { path: stale });
  assert.equal(await overSocket(stale), "hello");

  const used = join(folder, "used.sock");
  const other = createServer();
  await new Promise<void>((resolve) => other.listen(used, resolve));
  cleanup(t).defer(() => new Promise<void>((resolve) => other.close(() => resolve())));
  await assert.rejects(listen(hello, { path: used }), /in use/i);

  const file = join(folder, "file");
  writeFileSync(file, "precious");
  await assert.rejects(listen(hello, { path: file }), /in use/i);
  assert.ok(statSync(file).isFile());
});

test("close() waits for requests under way, until their answers are sent", async () => {
  const arrived = Promise.withResolvers<void>();
  const done = Promise.withResolvers<void>();
  const { url, close } = await listen(async () => (arrived.resolve(), await done.promise, hello()), LOCAL);
  // Another process: it reads when this one is already about to end.
  const answer = execa("curl", ["--silent", "--show-error", url], { reject: false });
  await arrived.promise;
  const closing = close(60_000);
  setImmediate(done.resolve);
  await closing;
  const { stdout, stderr } = await answer;
  assert.equal(stdout, "hello", stderr);
  await assert.rejects(fetch(url));
});

test("close() cuts what is still under way after the grace", { timeout: 20_000 }, async () => {
  const arrived = Promise.withResolvers<void>();
  const { url, close } = await listen(() => (arrived.resolve(), new Promise<Response>(() => {})), LOCAL);
  const answer = fetch(url).then(() => "answered", () => "cut");
  await arrived.promise;
  await close(50);
  assert.equal(await answer, "cut");
});

test("the API serves a socket file without asking for a token or a Host", async (t) => {
  const path = join(temporaryFolder(t), "api.sock");
  const { host } = await apiHost(t, { table: { listen: `unix:${path}` } });
  assert.equal(host.use("api").url, `unix:${path}`);
  assert.match(await overSocket(path), /not_found/);
});

test("the API listens on ::1", { skip: lacking(hasLoopback6() ? null : "no ::1 here") }, async (t) => {
  const { url, call } = await apiHost(t, { table: { listen: "[::1]:0" } });
  assert.match(url, /^http:\/\/\[::1\]:\d+$/);
  assert.equal((await call("GET", "/instances")).status, 200);
});

function hasLoopback6(): boolean {
  return Object.values(networkInterfaces()).flat().some((each) => each?.address === "::1");
}
