import assert from "node:assert/strict";
import { test } from "node:test";
import type { Plugin } from "../../main.ts";
import { healthPlugin } from "../../plugins/health/mod.ts";
import { PROBE_PORTS } from "../../plugins/shared/probe-ports.ts";
import { systemClock } from "../../plugins/shared/clock.ts";
import { freePort } from "../helpers.ts";
import { ORIGIN } from "../hypervisor/scripted.ts";
import { talk, wakeWorld } from "../wake/world.ts";

// W1: a port that answers is not an application that does.
test("a connection waits until the instance that it woke is healthy, where its policy says so", async (t) => {
  // First probes by chance a second late: what is fast here is fast because somebody waits.
  const world = await wakeWorld(t, { plugins: [healthPlugin(systemClock, () => 1) as Plugin] });
  const { driver, hypervisor, host } = world;
  let [asked, ready] = [0, false];
  const seen: string[] = [];
  driver.serve = (socket) => {
    const isProbe = socket.remotePort! >= PROBE_PORTS.first && socket.remotePort! <= PROBE_PORTS.last;
    socket.once("data", () => {
      seen.push(isProbe ? "probe" : `client, ${ready ? "ready" : "too early"}`);
      ready ||= isProbe && ++asked >= 5;
      socket.end(`HTTP/1.1 ${ready ? "200 OK" : "503 Starting"}\r\nContent-Length: 5\r\n\r\nhello`);
    });
  };
  const [port, guest] = [await freePort(), await freePort()];
  const { id } = await hypervisor.create({
    name: "web",
    image: "x",
    env: { PORT: String(guest) },
    health_check: { http: { port: guest }, interval: "1h" },
    wake: { ports: [{ host_port: port, guest_port: guest }], ready: "health" },
  }, ORIGIN);
  await hypervisor.standby(id, ORIGIN);
  [asked, ready] = [0, false];
  seen.length = 0;

  assert.match(await talk(port, "GET / HTTP/1.1\r\n\r\n"), /^HTTP\/1.1 200 OK.*hello$/s);
  // Before each of its questions wake has looked whether the port answers at all, and said nothing.
  assert.deepEqual(seen, ["probe", "probe", "probe", "probe", "probe", "client, ready"]);
  assert.equal(host.use("health").stateOf(hypervisor.find(id)!), "healthy");
});
