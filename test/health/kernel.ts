// Run by kernel.test.ts in a network of its own: the real kernel, processes, standby and wake.
import assert from "node:assert/strict";
import { once } from "node:events";
import { connect } from "node:net";
import { join } from "node:path";
import { test, type TestContext } from "node:test";
import { definePlugin, type HealthProbed, type LifecycleEvent, type Plugin } from "../../main.ts";
import conntrackPlugin from "../../plugins/conntrack/mod.ts";
import standbyPlugin from "../../plugins/conntrack-standby/mod.ts";
import healthPlugin from "../../plugins/health/mod.ts";
import hypervisorPlugin from "../../plugins/hypervisor/mod.ts";
import networkPlugin from "../../plugins/network/mod.ts";
import processPlugin from "../../plugins/process/mod.ts";
import { delay } from "../../plugins/shared/async.ts";
import { run } from "../../plugins/shared/run.ts";
import storePlugin from "../../plugins/store.ts";
import wakePlugin from "../../plugins/wake/mod.ts";
import { cleanup, RUNTIME, startWith, until } from "../helpers.ts";

const ORIGIN = { actor: "test", cause: "request" };
const GUEST = 8080;
const SERVER = join(import.meta.dirname!, "server.ts");
/** Twice a second, ten times within the idle timeout; each with time enough on a busy machine. */
const OFTEN = { interval: "500ms", timeout: "500ms", start_period: "1m" };
/** Once it is there: before, it would sleep while it starts, and nobody would wake it. */
const SLEEPY = { auto_standby: { enabled: true, idle_timeout: "5s" } };

async function worldOf(t: TestContext) {
  const [events, probed] = [[] as LifecycleEvent[], [] as HealthProbed[]];
  const listener = definePlugin({
    name: "listener",
    requires: ["hypervisor"],
    setup({ hooks }) {
      hooks.on("instance:event", (event) => void events.push(event), { buffer: 10_000 });
      hooks.on("health:probed", (probe) => void probed.push(probe), { buffer: 10_000 });
    },
  });
  const features = [conntrackPlugin, standbyPlugin, wakePlugin, healthPlugin, listener];
  const plugins = [storePlugin, networkPlugin, hypervisorPlugin, processPlugin, ...features] as Plugin[];
  const host = await startWith(t, plugins, {
    tables: {
      network: { bridge: "dmhealth0", subnet: "10.126.7.0/24" },
      process: { grace: "1s" },
      "conntrack-standby": { min_awake: "0s" },
    },
  });
  const hypervisor = host.use("hypervisor");
  cleanup(t).defer(async () => {
    for (const { id } of hypervisor.list()) await hypervisor.delete(id, ORIGIN);
  });
  const make = async (name: string, health_check: unknown) => {
    const body = {
      name,
      image: "host",
      cmd: [...RUNTIME, SERVER, String(GUEST)],
      health_check,
    };
    const { id, network } = await hypervisor.create(body, ORIGIN);
    return { id, ip: network.ip! };
  };
  const healthy = (id: string) =>
    until("it is healthy", () => host.use("health").stateOf(hypervisor.find(id)!) === "healthy", 180_000);
  const asleep = (id: string) => until("it sleeps", () => hypervisor.find(id)?.state === "Standby", 180_000);
  return { events, probed, hypervisor, make, healthy, asleep };
}

async function get(ip: string): Promise<string> {
  const socket = connect({ host: ip, port: GUEST });
  await once(socket, "connect");
  socket.write("GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
  let text = "";
  for await (const chunk of socket) text += chunk;
  return text;
}

// I16: an uptime monitor that keeps everything awake, or wakes it, is why people turn such a thing off.
test("instances that are probed twice a second fall asleep and sleep on", async (t) => {
  const { events, probed, hypervisor, make, healthy, asleep } = await worldOf(t);
  const checks = {
    http: { http: { port: GUEST, expected_body: "ready" } },
    tcp: { tcp: { port: GUEST } },
    exec: { exec: { command: ["/bin/true"] } },
  };
  await Promise.all(
    Object.entries(checks).map(async ([kind, check]) => {
      const { id, ip } = await make(kind, { ...check, ...OFTEN });
      const probes = () => probed.filter(({ instance_id }) => instance_id === id).length;
      await healthy(id);
      const first = probes();
      await hypervisor.update(id, SLEEPY, ORIGIN);
      await asleep(id);
      const before = probes();
      assert.ok(before >= first + 2, `${kind} was probed while it counted down`);
      // For what must not happen there is nothing to wait for.
      await delay(2_000);
      assert.deepEqual([hypervisor.find(id)!.state, probes()], ["Standby", before], kind);

      assert.match(await get(ip), /ready$/, kind);
      await until("it is awake", () => hypervisor.find(id)?.state === "Running");
      await asleep(id);
      assert.ok(probes() >= before + 2, `${kind} was probed again`);
      const acted = events.filter(({ instance_id, action }) =>
        instance_id === id && (action === "standby" || action === "restore")
      );
      assert.deepEqual(acted.map(({ actor }) => actor), ["auto-standby", "wake", "auto-standby"], kind);
    }),
  );
});

test("probes leave next to nothing in the kernel's tables", async (t) => {
  const { probed, make, healthy } = await worldOf(t);
  const http = { port: GUEST, expected_body: "ready" };
  const { id, ip } = await make("web", { http, ...OFTEN, interval: "50ms", timeout: "50ms" });
  await healthy(id);
  const before = probed.length;
  await until("it was probed", () => probed.length >= before + 200, 180_000);
  // In TIME_WAIT each would stay a minute here, and two in the table of connections. One may be on its way there when it
  // is cut off, where the server was late.
  await until("next to none waits", async () => {
    const sockets = await run("ss", ["-tanH", "state", "time-wait", "dst", ip]);
    return sockets.split("\n").filter(Boolean).length < 10;
  }, 20_000);
  const probes = async () => {
    const flows = await run("conntrack", ["-L", "-p", "tcp", "--orig-dst", ip]);
    return flows.split("\n").filter((line) => / sport=64\d\d\d dport=8080 /.test(line));
  };
  assert.ok((await probes()).length > 0);
  // One that is just being ended has been told so by the other side first.
  const states = / (CLOSE|SYN_\w+|ESTABLISHED) /;
  const staying = async () => (await probes()).filter((line) => !states.test(line));
  await until("next to none of them stays", async () => (await staying()).length < 10);
});
