/**
 * The decision path of conntrack-standby. Events per second from the listener of a conntrack event to the decision that
 * follows from it (busy, idle, timer set), with 10, 1,000 and 10,000 instances: each connection is five events, and each
 * fifth of them has its instance idle again. Budget: 100,000 events/s with 10,000 instances, and the same for few as for
 * many. Then 500 instances that go idle at once, to the moment when the last of them sleeps, against standbys that are
 * simply asked for, as many at a time.
 */
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import {
  type Conntrack,
  definePlugin,
  type Driver,
  type Flow,
  type FlowKind,
  type Hypervisor,
  loadPlugins,
  type Network,
  type Plugin,
  startHost,
} from "../../main.ts";
import standby from "../../plugins/conntrack-standby/mod.ts";
import hypervisor from "../../plugins/hypervisor/mod.ts";
import { delay, pooled } from "../../plugins/shared/async.ts";
import { HOST_DEFAULTS } from "../../plugins/shared/config.ts";
import store from "../../plugins/store.ts";

const ORIGIN = { actor: "bench", cause: "request" };
const STATES = ["SYN_SENT", "SYN_RECV", "ESTABLISHED", "FIN_WAIT", "TIME_WAIT"];
const EVENTS = 500_000;
const AT_ONCE = 500;
const WORKERS = 16;

type Listener = (kind: FlowKind, flow: Flow) => void;

/** Tells what the benchmark makes up, and dumps what it leaves open. */
class Source implements Conntrack {
  readonly mode = "netlink";
  readonly error = null;
  readonly listeners = new Map<string, Listener>();
  flows: Flow[] = [];
  watch(address: string, listener: Listener): Disposable {
    this.listeners.set(address, listener);
    return { [Symbol.dispose]: () => void this.listeners.delete(address) };
  }
  follow = () => ({ [Symbol.dispose]() {} });
  dump = () => Promise.resolve(this.flows);
  stats = () => ({ events: 0, dropped: 0, malformed: 0, resyncs: 0 });
}

/** Changes state at once, so that what is measured is the way to the driver and not the driver. */
const instant: Driver = {
  name: "instant",
  features: new Set(["standby"] as const),
  unavailable: () => null,
  validate() {},
  async create() {},
  start: async () => "Running",
  stop: async () => ({ exit_code: 0, exit_message: null }),
  async delete() {},
  inspect: async (instance) => instance.state === "Standby" ? { state: "Standby" } : { state: "Running" },
  adopt: async () => ({ state: "Running" }),
  async standby() {},
  restore: async () => "Running",
};

async function hosted(source: Source, work: (registry: Hypervisor) => Promise<void>): Promise<void> {
  let last = 1;
  const network = {
    enabled: true,
    gateway: "10.88.0.1",
    allocate: () => ({ ip: `10.88.${++last >> 8}.${last & 255}`, ip6: null, mac: "" }),
    release() {},
  } as unknown as Network;
  const surroundings = definePlugin({
    name: "surroundings",
    provides: ["conntrack", "network"],
    setup(host) {
      host.provide("conntrack", source);
      host.provide("network", network);
    },
  });
  const driver = definePlugin({
    name: "instant",
    requires: ["hypervisor"],
    setup: (host) => void host.use("hypervisor").register(instant),
  });
  const folder = mkdtempSync(join(tmpdir(), "dormouse-bench-"));
  const plugins = [store, surroundings, hypervisor, driver, standby] as Plugin[];
  const options: Record<string, Record<string, unknown>> = {
    hypervisor: { default_driver: "instant", reconcile_interval: "1h" },
    "conntrack-standby": { min_awake: "0s", max_concurrent: WORKERS },
  };
  const given = new Map(plugins.map((plugin) => [plugin.name, plugin]));
  const tables = plugins.map(({ name }) => ({ name, options: options[name] ?? {} }));
  const config = { dataDir: folder, host: { ...HOST_DEFAULTS, event_buffer: 100_000 }, plugins: tables };
  try {
    await using host = await startHost(config, await loadPlugins(config, { given }));
    await work(host.use("hypervisor"));
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

const create = (registry: Hypervisor, count: number, idle_timeout: string) =>
  pooled(
    64,
    Array.from({ length: count }, (_, i) => i),
    (i) => registry.create({ name: `i${i}`, image: "any", auto_standby: { enabled: true, idle_timeout } }, ORIGIN),
  );

/** Events per second, the median of five rounds. */
async function throughput(count: number): Promise<number> {
  const source = new Source();
  const rates: number[] = [];
  await hosted(source, async (registry) => {
    await create(registry, count, "1h");
    await delay(100);
    const addresses = [...source.listeners.keys()];
    // Made beforehand: that is the source's work, and has a benchmark of its own.
    const flows = Array.from({ length: EVENTS }, (_, i): Flow => {
      const destination = addresses[Math.floor(i / 5) % addresses.length];
      const source_port = 1024 + Math.floor(i / 5) % 60_000;
      const [source, destination_port] = ["192.0.2.7", 80];
      return { protocol: "tcp", source, source_port, destination, destination_port, state: STATES[i % 5] };
    });
    for (let round = 0; round < 6; round++) {
      const begin = performance.now();
      for (let i = 0; i < flows.length; i++) {
        source.listeners.get(flows[i].destination)!(i % 5 === 0 ? "new" : "update", flows[i]);
      }
      const seconds = (performance.now() - begin) / 1000;
      if (round > 0) rates.push(EVENTS / seconds); // the first warms up
      await delay(300); // what is remembered is written meanwhile, as it would be
    }
  });
  return rates.sort((a, b) => a - b)[Math.floor(rates.length / 2)];
}

/** Milliseconds from the end of the last connections to the sleep of the last instance, over the idle timeout. */
async function allAsleep(): Promise<{ ours: number; bare: number }> {
  const source = new Source();
  const result = { ours: 0, bare: 0 };
  await hosted(source, async (registry) => {
    await create(registry, AT_ONCE, "1s");
    const open = [...source.listeners].map(([destination, listener], i): [Flow, Listener] => {
      const [protocol, source, source_port, destination_port] = ["tcp" as const, "192.0.2.7", 1024 + i, 80];
      return [{ protocol, source, source_port, destination, destination_port, state: "ESTABLISHED" }, listener];
    });
    const asleep = () => registry.list({ state: "Standby" }).length;
    for (const [flow, listener] of open) listener("new", flow);
    source.flows = open.map(([flow]) => flow);
    await delay(200);
    source.flows = [];
    const begin = performance.now();
    for (const [flow, listener] of open) listener("destroy", flow);
    while (asleep() < AT_ONCE) await delay(1);
    result.ours = performance.now() - begin - 1_000;
    const ids = registry.list().map(({ id }) => id);
    for (const id of ids) await registry.restore(id, ORIGIN);
    const again = performance.now();
    await pooled(WORKERS, ids, (id) => registry.standby(id, ORIGIN));
    result.bare = performance.now() - again;
  });
  return result;
}

export async function main(): Promise<void> {
  const rates: number[] = [];
  for (const count of [10, 1_000, 10_000]) {
    rates.push(await throughput(count));
    console.log(
      `standby: ${String(count).padStart(6)} instances  ${Math.round(rates.at(-1)!).toLocaleString("en")} events/s`,
    );
  }
  const [few, , many] = rates;
  console.log(`standby: 10,000 instances against 10: ${(many / few).toFixed(2)}x`);
  console.log(`standby: budget (100,000 events/s with 10,000 instances): ${many >= 100_000 ? "met" : "MISSED"}`);
  const { ours, bare } = await allAsleep();
  const ratio = `${(ours / bare).toFixed(2)}x the bare standbys, ${bare.toFixed(0)} ms`;
  console.log(
    `standby: ${AT_ONCE} instances idle at once: all asleep ${ours.toFixed(0)} ms after the timeout (${ratio})`,
  );
}

if (import.meta.main) {
  await main();
  process.exit(0);
}
