import assert from "node:assert/strict";
import { once } from "node:events";
import { createServer, type Socket } from "node:net";
import { test, type TestContext } from "node:test";
import { dialProbe, isProbe, PROBE_PORTS } from "../../plugins/shared/probe-ports.ts";
import { cleanup } from "../helpers.ts";

async function listen(t: TestContext, port = 0, host = "127.0.0.1") {
  const sockets: Socket[] = [];
  const server = createServer((socket) => void sockets.push(socket.on("error", () => {})));
  server.listen(port, host);
  await once(server, "listening");
  cleanup(t).defer(() => {
    for (const socket of sockets) socket.destroy();
    server.close();
  });
  return { port: (server.address() as { port: number }).port, sockets };
}

// I16: not by the address alone, for the host's own users come from there as well.
test("isProbe() is true for the host's address with a port of the range, and for nothing else", () => {
  const cases: [string, number, boolean][] = [
    ["10.88.0.1", PROBE_PORTS.first, true],
    ["10.88.0.1", PROBE_PORTS.last, true],
    ["fd00::1", PROBE_PORTS.first + 1, true],
    ["10.88.0.1", PROBE_PORTS.first - 1, false],
    ["10.88.0.1", PROBE_PORTS.last + 1, false],
    ["10.88.0.2", PROBE_PORTS.first, false],
  ];
  for (const [source, source_port, expected] of cases) {
    assert.equal(isProbe({ source, source_port }, "10.88.0.1", "fd00::1", null), expected, `${source} ${source_port}`);
  }
});

test("dialProbe() comes from a port of the range, another one for each of many at once", async (t) => {
  const { port } = await listen(t);
  const sockets = await Promise.all(Array.from({ length: 100 }, () => dialProbe("127.0.0.1", port)));
  const ports = sockets.map(({ localPort }) => localPort!);
  for (const socket of sockets) socket.destroy();
  assert.equal(new Set(ports).size, 100);
  assert.ok(ports.every((each) => isProbe({ source: "x", source_port: each }, "x")), String(ports));
});

test("dialProbe() passes over ports that somebody has", async (t) => {
  const { port } = await listen(t);
  const first = await dialProbe("127.0.0.1", port);
  const held = first.localPort!;
  first.destroy();
  const taken = [1, 2, 3].map((step) => PROBE_PORTS.first + (held - PROBE_PORTS.first + step) % 512);
  for (const each of taken) await listen(t, each, "0.0.0.0");
  const socket = await dialProbe("127.0.0.1", port);
  socket.destroy();
  assert.equal(taken.includes(socket.localPort!), false);
});

test("dialProbe() rejects when nobody listens, nobody answers, or it is aborted", async (t) => {
  const { port, sockets } = await listen(t);
  for (const socket of sockets) socket.destroy();
  await assert.rejects(dialProbe("127.0.0.1", port, { signal: AbortSignal.abort(new Error("enough")) }), /enough/);
  await assert.rejects(dialProbe("127.0.0.1", 1), { code: "ECONNREFUSED" });
});
