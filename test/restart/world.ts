import type { TestContext } from "node:test";
import {
  definePlugin,
  type HealthState,
  type Hypervisor,
  type Instance,
  type LifecycleEvent,
  type Note,
  type Plugin,
  type Restart,
  type RunningHost,
} from "../../main.ts";
import hypervisorPlugin from "../../plugins/hypervisor/mod.ts";
import { restartPlugin } from "../../plugins/restart/mod.ts";
import storePlugin from "../../plugins/store.ts";
import { ManualClock, settle } from "../clock.ts";
import { startWith, temporaryFolder } from "../helpers.ts";
import { ScriptedDriver } from "../hypervisor/scripted.ts";

export const ORIGIN = { actor: "test", cause: "request" };

/** What is said of instances' health, by whom a test wants to play. */
export class Clinic {
  readonly states = new Map<string, HealthState>();
  host: RunningHost | undefined;
  stateOf = ({ id }: Instance): HealthState => this.states.get(id) ?? "disabled";

  /** The health of an instance is another from now on, and everybody is told. */
  async say(instance: Instance, to: HealthState): Promise<void> {
    const from = this.stateOf(instance);
    this.states.set(instance.id, to);
    const change = { instance_id: instance.id, instance, at: 0, from, to, error: to === "unhealthy" ? "500" : null };
    this.host!.hooks.publish("health:changed", change);
    await settle();
  }
}

export interface World {
  folder: string;
  host: RunningHost;
  hypervisor: Hypervisor;
  restart: Restart;
  driver: ScriptedDriver;
  clock: ManualClock;
  clinic: Clinic;
  events: LifecycleEvent[];
  notes: Note[];
  /** The notes' types, those of one instance only where it is given. */
  said(id?: string): string[];
  /** A running instance, restarted always where nothing else is said. */
  instance(name?: string, restart_policy?: Record<string, unknown> | null): Promise<Instance>;
  /** It ends by itself, and the driver notices. */
  crash(id: string, exit_code?: number | null): Promise<void>;
  state(id: string): string | undefined;
  /** `restart_status` of its response. */
  status(id: string): Record<string, unknown> | undefined;
  /** How often the driver was asked to start anything. */
  starts(): number;
  /** Closes this host and starts the next one over the same folder and machines, `meanwhile` in between. */
  again(meanwhile?: () => void | Promise<void>): Promise<World>;
}

export interface WorldOptions {
  folder?: string;
  driver?: ScriptedDriver;
  clock?: ManualClock;
  clinic?: Clinic;
  random?: () => number;
  plugins?: Plugin[];
  /** The `[plugins.restart]` table. */
  table?: Record<string, unknown>;
  /** Without the plugin, as when the config turns it off. */
  off?: boolean;
}

/** The real registry, store and plugin, on a clock, luck, a driver and a health that are as the test says. */
export async function world(t: TestContext, options: WorldOptions = {}): Promise<World> {
  const { folder = temporaryFolder(t), driver = new ScriptedDriver(), clock = new ManualClock() } = options;
  const { clinic = new Clinic(), random = () => 1, plugins = [], table = {}, off = false } = options;
  const [events, notes] = [[] as LifecycleEvent[], [] as Note[]];
  const health = definePlugin({
    name: "clinic",
    provides: ["health"],
    setup: (host) => host.provide("health", { stateOf: clinic.stateOf, stats: () => ({ running: 0, waiting: 0 }) }),
  });
  const scripted = definePlugin({
    name: "scripted",
    requires: ["hypervisor"],
    setup(host) {
      const registered = host.use("hypervisor").register(driver);
      host.defer(() => registered[Symbol.dispose]());
      host.hooks.on("instance:event", (event) => void events.push(event), { buffer: 100_000 });
      host.hooks.on("note:event", (note) => void notes.push(note), { buffer: 100_000 });
    },
  });
  const tested = off ? [] : [restartPlugin(clock, random)];
  const all = [storePlugin, hypervisorPlugin, scripted, health, ...plugins, ...tested] as Plugin[];
  const tables = { hypervisor: { default_driver: "scripted", reconcile_interval: "1h" }, restart: table };
  const host = await startWith(t, all, { folder, tables });
  clinic.host = host;
  await settle();
  const hypervisor = host.use("hypervisor");
  return {
    folder,
    host,
    hypervisor,
    restart: host.use("restart"),
    driver,
    clock,
    clinic,
    events,
    notes,
    said: (id) => notes.filter(({ instance_id }) => id === undefined || instance_id === id).map(({ type }) => type),
    async instance(name = "web", restart_policy = { policy: "always" }) {
      const body = { name, image: "any", ...(restart_policy && { restart_policy }) };
      return await hypervisor.create(body, ORIGIN);
    },
    async crash(id, exit_code = 1) {
      driver.machines.set(id, { state: "Stopped", exit_code, exit_message: "gone" });
      hypervisor.changed(id, "exit");
      await settle(6);
    },
    state: (id) => hypervisor.find(id)?.state,
    status: (id) => hypervisor.present(hypervisor.find(id)!).restart_status as Record<string, unknown> | undefined,
    starts: () => driver.calls.filter((call) => call === "start").length,
    async again(meanwhile) {
      await host.close();
      await meanwhile?.();
      return await world(t, { ...options, folder, driver, clock, clinic, off: false });
    },
  };
}

/** The time of `restart_status` that many milliseconds from now. */
export function inMs(clock: ManualClock, ms: number): string {
  return new Date(clock.now() + ms).toISOString();
}
