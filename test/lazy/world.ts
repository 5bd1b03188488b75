import { cpSync, mkdirSync } from "node:fs";
import { join } from "node:path";
import type { TestContext } from "node:test";
import {
  type Api,
  type ApiCall,
  type ApiRoute,
  definePlugin,
  type Hypervisor,
  type Instance,
  type Lazy,
  type LifecycleEvent,
  type Note,
  type Plugin,
  type RunningHost,
} from "../../main.ts";
import hypervisorPlugin from "../../plugins/hypervisor/mod.ts";
import journalPlugin from "../../plugins/journal/mod.ts";
import { lazyPlugin } from "../../plugins/lazy/mod.ts";
import storePlugin from "../../plugins/store.ts";
import { ManualClock, settle } from "../clock.ts";
import { startWith, temporaryFolder } from "../helpers.ts";
import { ScriptedDriver } from "../hypervisor/scripted.ts";

export const PERSON = { actor: "api", cause: "request" };

export interface Lease {
  lease: string;
  instance: string;
  expires_at: string;
  latency_ms: number;
  started: boolean;
}

export interface World {
  host: RunningHost;
  hypervisor: Hypervisor;
  lazy: Lazy;
  driver: ScriptedDriver;
  clock: ManualClock;
  events: LifecycleEvent[];
  notes: Note[];
  /** A running instance; `lazy` is its policy, 10s of idle window where nothing else is said. */
  instance(name?: string, lazy?: unknown): Promise<Instance>;
  /** The same, stopped by the idle window. */
  stopped(name?: string, lazy?: Record<string, unknown>): Promise<Instance>;
  acquire(name: string, ttl?: string, signal?: AbortSignal): Promise<Lease>;
  renew(name: string, lease: string, ttl?: string): Promise<Lease>;
  release(name: string, lease: string): Promise<void>;
  state(name: string): string;
  /** `lifecycle_state` and `lifecycle_metrics` as in a response. */
  shown(name: string): { lifecycle_state: string | null; lifecycle_metrics: Metrics };
  /** The types of the notes. */
  said(): string[];
}
export interface Metrics {
  starts: number;
  start_failures: number;
  stops: number;
  stop_failures: number;
  leases_granted: number;
  start_latency_ms: Statistics;
  idle_seconds: Statistics;
  last_event: { type: string; ts: string } | null;
}
interface Statistics {
  last: number | null;
  mean: number | null;
  min: number | null;
  max: number | null;
  count: number;
}

export interface WorldOptions {
  folder?: string;
  driver?: ScriptedDriver;
  clock?: ManualClock;
  plugins?: Plugin[];
  /** The `[plugins.lazy]` table. */
  table?: Record<string, unknown>;
  /** Whether there is a journal; there is one. */
  journal?: boolean;
}

/** The real registry, store, journal and plugin, with a driver and a clock that do as the test says. */
export async function world(t: TestContext, options: WorldOptions = {}): Promise<World> {
  const { clock = new ManualClock(), driver = new ScriptedDriver(), plugins = [], table = {}, journal = true } =
    options;
  const [events, notes, routes] = [[] as LifecycleEvent[], [] as Note[], [] as ApiRoute[]];
  const scripted = definePlugin({
    name: "scripted",
    requires: ["hypervisor"],
    provides: ["api"],
    setup(host) {
      const registered = host.use("hypervisor").register(driver);
      host.defer(() => registered[Symbol.dispose]());
      host.hooks.on("instance:event", (event) => void events.push(event), { buffer: 100_000 });
      host.hooks.on("note:event", (note) => void notes.push(note), { buffer: 100_000 });
      // Routes are called in this process, so that nothing but the test decides what comes before what.
      host.provide("api", { route: (route) => void routes.push(route), url: "" } as Partial<Api> as Api);
    },
  });
  const all = [storePlugin, hypervisorPlugin, scripted, ...(journal ? [journalPlugin] : []), ...plugins];
  const host = await startWith(t, [...all, lazyPlugin(clock)] as Plugin[], {
    // Its look at the driver goes by the real clock, which has no place in a story that a test tells.
    tables: { hypervisor: { default_driver: "scripted", reconcile_interval: "1h" }, lazy: table },
    ...(options.folder && { folder: options.folder }),
  });
  const [hypervisor, lazy] = [host.use("hypervisor"), host.use("lazy")];
  const call = async (method: string, path: string, params: Record<string, string>, more: Partial<ApiCall> = {}) => {
    const route = routes.find((each) => each.method === method && each.path === path)!;
    const { signal } = new AbortController();
    const blank = { id: "", query: {}, headers: new Headers(), origin: PERSON, signal, body: {} };
    const answer = await route.handle({ ...blank, params, ...more });
    return (answer as { body?: unknown }).body as Lease;
  };
  const made = async (name = "web", policy: unknown = { enabled: true, idle_stop: "10s" }) => {
    const instance = await hypervisor.create({ name, image: "any", lazy: policy }, PERSON);
    await settle();
    return instance;
  };
  return {
    host,
    hypervisor,
    lazy,
    driver,
    clock,
    events,
    notes,
    instance: made,
    async stopped(name, policy) {
      const instance = await made(name, { enabled: true, idle_stop: "10s", ...policy });
      await clock.pass(10_000);
      return hypervisor.find(instance.id)!;
    },
    acquire: (id, ttl, signal) =>
      call("POST", "/instances/:id/acquire", { id }, { ...(ttl && { body: { ttl } }), ...(signal && { signal }) }),
    renew: (id, lease, ttl) =>
      call("POST", "/instances/:id/leases/:lease/renew", { id, lease }, ttl === undefined ? {} : { body: { ttl } }),
    release: async (id, lease) => void await call("DELETE", "/instances/:id/leases/:lease", { id, lease }),
    state: (name) => hypervisor.resolve(name).state,
    shown: (name) => hypervisor.present(hypervisor.resolve(name)) as unknown as ReturnType<World["shown"]>,
    said: () => notes.map(({ type }) => type),
  };
}

/**
 * A folder as one is left behind by `kill -9` in this moment: the database with what was committed, and nobody who has
 * closed it. Nothing is written while it is copied, for that does not wait.
 */
export function killed(t: TestContext, folder: string): string {
  const copy = temporaryFolder(t);
  mkdirSync(join(copy, "data"));
  for (const name of ["dormouse.db", "dormouse.db-wal"]) cpSync(join(folder, "data", name), join(copy, "data", name));
  return copy;
}
