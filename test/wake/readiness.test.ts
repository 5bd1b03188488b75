import assert from "node:assert/strict";
import { createServer } from "node:net";
import { once } from "node:events";
import { test } from "node:test";
import { PROBE_PORTS } from "../../plugins/shared/probe-ports.ts";
import { Readiness } from "../../plugins/wake/readiness.ts";
import { settle } from "../clock.ts";
import { cleanup } from "../helpers.ts";
import { ORIGIN } from "../hypervisor/scripted.ts";
import { talk, wakeWorld } from "./world.ts";

// W12: neither a slow first look, nor a pause that grows without end.
test("wait() looks after 25 ms, then half as often each time, down to every 500 ms", async (t) => {
  const server = createServer((socket) => void socket.on("error", () => {}).resume().end()).listen(0, "127.0.0.1");
  cleanup(t).defer(() => void server.close());
  await once(server, "listening");
  const { port } = server.address() as { port: number };
  const readiness = new Readiness();
  cleanup(t).defer(() => readiness[Symbol.dispose]());
  let looks = 0;
  let [looked, isReady] = [Promise.withResolvers<void>(), false];
  const passes = () => {
    looks++;
    looked.resolve();
    looked = Promise.withResolvers();
    return isReady ? Promise.resolve() : Promise.reject(new Error("not yet"));
  };
  t.mock.timers.enable({ apis: ["setTimeout"] });
  cleanup(t).defer(() => t.mock.timers.reset());
  const first = looked.promise;
  const answered = readiness.wait("id", { host: "127.0.0.1", host6: null, port, timeout: 300_000, passes });
  await first;
  for (const pause of [25, 50, 100, 200, 400, 500, 500]) {
    const before = looks;
    await settle(5);
    t.mock.timers.tick(pause - 1);
    await settle(5);
    assert.equal(looks, before, `not before ${pause} ms`);
    const next = looked.promise;
    t.mock.timers.tick(1);
    await next;
  }
  isReady = true;
  await settle(5);
  t.mock.timers.tick(500);
  assert.equal(await answered, true);
  assert.equal(readiness.isSettled("id", port), true);
});

// W6: the listener of the host port always takes connections, so it would say yes to every probe.
test("a wake probes the instance itself, from a port of the probes, and never the host port", async (t) => {
  const { make, driver, hypervisor, wake } = await wakeWorld(t);
  const { id, port } = await make("web");
  await hypervisor.standby(id, ORIGIN);
  const sources: number[] = [];
  const serve = driver.serve;
  driver.serve = (socket) => (sources.push(socket.remotePort!), serve(socket));
  assert.equal(await talk(port, "hello"), "hello");
  const isProbe = (source: number) => source >= PROBE_PORTS.first && source <= PROBE_PORTS.last;
  assert.deepEqual(sources.map(isProbe), [true, false]);
  assert.equal(wake.stats().connections, 1);
});
