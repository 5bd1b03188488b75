import type { TestContext } from "node:test";
import {
  type Conntrack,
  definePlugin,
  type Flow,
  type FlowKind,
  type Hypervisor,
  type Instance,
  type LifecycleEvent,
  type Network,
  type Plugin,
  type RunningHost,
  type StandbyDecision,
  type StandbyFlapping,
  type Store,
} from "../../main.ts";
import hypervisorPlugin from "../../plugins/hypervisor/mod.ts";
import storePlugin from "../../plugins/store.ts";
import { ManualClock, settle } from "../clock.ts";
import { startWith } from "../helpers.ts";
import { standbyPlugin } from "../../plugins/conntrack-standby/mod.ts";
import { ScriptedDriver } from "../hypervisor/scripted.ts";

/** A connection table with its events, both of which can be made to fail. */
export class ScriptedKernel implements Conntrack {
  readonly mode = "netlink";
  error: string | null = null;
  readonly table = new Map<string, Flow>();
  dumps = 0;
  /** Events are lost without a word. */
  deaf = false;
  /** Runs in the middle of a dump: it may wait, throw, or change the table. */
  duringDump: (() => void | Promise<void>) | undefined;
  #watchers = new Map<string, Set<(kind: FlowKind, flow: Flow) => void>>();
  #followers = new Set<{ lost(reason: string): void; connected(): void }>();

  watch(address: string, listener: (kind: FlowKind, flow: Flow) => void): Disposable {
    const listeners = this.#watchers.get(address) ?? new Set();
    this.#watchers.set(address, listeners.add(listener));
    return { [Symbol.dispose]: () => void listeners.delete(listener) };
  }
  follow(listener: { lost(reason: string): void; connected(): void }): Disposable {
    this.#followers.add(listener);
    return { [Symbol.dispose]: () => void this.#followers.delete(listener) };
  }
  async dump(): Promise<Flow[]> {
    this.dumps++;
    const flows = [...this.table.values()];
    await this.duringDump?.();
    return flows;
  }
  stats = () => ({ events: 0, dropped: 0, malformed: 0, resyncs: 0 });

  get watched(): number {
    return [...this.#watchers.values()].reduce((sum, { size }) => sum + size, 0);
  }
  lose(reason = "overflow"): void {
    this.error = reason;
    for (const follower of this.#followers) follower.lost(reason);
  }
  connect(): void {
    this.error = null;
    for (const follower of this.#followers) follower.connected();
  }
  /** Puts a flow into the table, or changes its state, and tells of it; finished ones go when they are destroyed. */
  set(flow: Flow): void {
    const key = keyOf(flow);
    const kind = this.table.has(key) ? "update" : "new";
    this.table.set(key, flow);
    this.#tell(kind, flow);
  }
  destroy(flow: Flow): void {
    this.table.delete(keyOf(flow));
    this.#tell("destroy", flow);
  }
  #tell(kind: FlowKind, flow: Flow): void {
    if (this.deaf) return;
    for (const listener of this.#watchers.get(flow.destination) ?? []) listener(kind, flow);
  }
}

const keyOf = (flow: Flow) =>
  [flow.protocol, flow.source, flow.source_port, flow.destination_port].join() + flow.destination;

/** A TCP connection from somewhere to port 80 of the first instance, established where nothing else is said. */
export function flow(changes: Partial<Flow> = {}): Flow {
  const source = { source: "192.0.2.7", source_port: 40_000 };
  const destination = { destination: "10.88.0.2", destination_port: 80 };
  return { protocol: "tcp", ...source, ...destination, state: "ESTABLISHED", ...changes };
}

export interface World {
  host: RunningHost;
  hypervisor: Hypervisor;
  driver: ScriptedDriver;
  clock: ManualClock;
  kernel: ScriptedKernel;
  events: LifecycleEvent[];
  decisions: StandbyDecision[];
  flaps: StandbyFlapping[];
  /** `decision reason` of each. */
  said(): string[];
  /** A running instance with a policy, 10s of idle timeout where nothing else is said. */
  instance(name?: string, auto_standby?: unknown): Promise<Instance>;
  state(id: string): string | undefined;
}

export interface WorldOptions {
  folder?: string;
  driver?: ScriptedDriver;
  clock?: ManualClock;
  kernel?: ScriptedKernel;
  plugins?: Plugin[];
  /** The `[plugins.conntrack-standby]` table. */
  table?: Record<string, unknown>;
  tables?: Record<string, Record<string, unknown>>;
}

export const ORIGIN = { actor: "test", cause: "request" };

/** The real registry, store and plugin, on a clock, a driver and a connection table that do as the test says. */
export async function world(t: TestContext, options: WorldOptions = {}): Promise<World> {
  const { clock = new ManualClock(), kernel = new ScriptedKernel(), driver = new ScriptedDriver() } = options;
  const { plugins = [], table = {}, tables = {} } = options;
  const [events, decisions, flaps] = [[] as LifecycleEvent[], [] as StandbyDecision[], [] as StandbyFlapping[]];
  const surroundings = definePlugin({
    name: "surroundings",
    requires: ["store"],
    provides: ["conntrack", "network"],
    setup(host) {
      host.provide("conntrack", kernel);
      host.provide("network", addressing(host.use("store")));
    },
  });
  const scripted = definePlugin({
    name: "scripted",
    requires: ["hypervisor"],
    setup(host) {
      const registered = host.use("hypervisor").register(driver);
      host.defer(() => registered[Symbol.dispose]());
      host.hooks.on("instance:event", (event) => void events.push(event), { buffer: 100_000 });
      host.hooks.on("standby:decision", (decision) => void decisions.push(decision), { buffer: 100_000 });
      host.hooks.on("standby:flapping", (flap) => void flaps.push(flap), { buffer: 100_000 });
    },
  });
  const all = [storePlugin, surroundings, hypervisorPlugin, scripted, ...plugins, standbyPlugin(clock)] as Plugin[];
  const host = await startWith(t, all, {
    tables: {
      // Its look at the driver goes by the real clock, which has no place in a story that a test tells.
      hypervisor: { default_driver: "scripted", reconcile_interval: "1h" },
      "conntrack-standby": table,
      ...tables,
    },
    ...(options.folder && { folder: options.folder }),
  });
  const hypervisor = host.use("hypervisor");
  return {
    host,
    hypervisor,
    driver,
    clock,
    kernel,
    events,
    decisions,
    flaps,
    said: () => decisions.map(({ decision, reason }) => `${decision} ${reason}`),
    async instance(name = "web", auto_standby = { enabled: true, idle_timeout: "10s" }) {
      const made = await hypervisor.create({ name, image: "any", auto_standby }, ORIGIN);
      await settle();
      return made;
    },
    state: (id) => hypervisor.find(id)?.state,
  };
}

/** Gives out 10.88.0.2 and on, again after a restart too, and attaches nothing. */
function addressing(store: Store): Network {
  store.migrate("addressing", ["CREATE TABLE addresses (n INTEGER PRIMARY KEY, id TEXT) STRICT"]);
  const insert = store.db.prepare("INSERT INTO addresses (id) VALUES (?)");
  return {
    enabled: true,
    reason: null,
    bridge: "none",
    subnet: "10.88.0.0/16",
    gateway: "10.88.0.1",
    allocate(id: string) {
      const n = Number(insert.run(id).lastInsertRowid) + 1;
      return { ip: `10.88.${n >> 8}.${n & 255}`, ip6: `fd88::${n.toString(16)}`, mac: "02:00:00:00:00:01" };
    },
    release() {},
    attach: () => Promise.reject(new Error("Nothing to attach")),
    async detach() {},
  } as unknown as Network;
}
