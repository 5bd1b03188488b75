import type { TestContext } from "node:test";
import {
  definePlugin,
  type Driver,
  type Hypervisor,
  type Instance,
  type LifecycleEvent,
  type Plugin,
  type Reading,
  type RunningHost,
  type Size,
} from "../../main.ts";
import hypervisorPlugin from "../../plugins/hypervisor/mod.ts";
import storePlugin from "../../plugins/store.ts";
import { startWith } from "../helpers.ts";

export const ORIGIN = { actor: "test", cause: "request" };

type Method =
  | "validate"
  | "create"
  | "start"
  | "stop"
  | "pause"
  | "resume"
  | "standby"
  | "restore"
  | "fork"
  | "delete"
  | "inspect"
  | "adopt";
type Script = (instance: Instance, signal: AbortSignal) => void | Promise<void>;

/**
 * A driver that does what a test tells it to: it waits, fails or dies on cue, which no real one can be made to. What it
 * "runs" is kept in `machines`, which a test hands to the next host to play a restart.
 */
export class ScriptedDriver implements Driver {
  readonly name = "scripted";
  readonly features = new Set(["pause", "standby", "host-network", "fork"] as const);
  readonly machines: Map<string, Reading>;
  readonly calls: string[] = [];
  /** Runs at the begin of a method; what it throws fails the method. */
  readonly script: Partial<Record<Method, Script>> = {};
  /** What an instance gets. */
  size: Size | undefined;
  /** What start and restore bring the instance to. */
  ready: "Initializing" | "Running" = "Running";

  constructor(machines: Map<string, Reading> = new Map()) {
    this.machines = machines;
  }

  unavailable = () => null;
  validate = async (instance: Instance) => {
    await this.#play("validate", instance);
    return this.size;
  };
  create = async (instance: Instance) => {
    await this.#play("create", instance);
    this.machines.set(instance.id, { state: "Stopped", exit_code: null, exit_message: null });
  };
  start = async (instance: Instance, signal: AbortSignal) => {
    await this.#play("start", instance, signal);
    this.machines.set(instance.id, { state: this.ready });
    return this.ready;
  };
  stop = async (instance: Instance, signal: AbortSignal) => {
    await this.#play("stop", instance, signal);
    const exit = { exit_code: 0, exit_message: "exited" };
    this.machines.set(instance.id, { state: "Stopped", ...exit });
    return exit;
  };
  pause = (instance: Instance) => this.#to("pause", instance, "Paused");
  resume = (instance: Instance) => this.#to("resume", instance, "Running");
  standby = (instance: Instance, signal: AbortSignal) => this.#to("standby", instance, "Standby", signal);
  restore = async (instance: Instance, signal: AbortSignal) => {
    await this.#to("restore", instance, this.ready, signal);
    return this.ready;
  };
  fork = async (source: Instance, target: Instance) => {
    await this.#play("fork", source);
    this.machines.set(target.id, this.machines.get(source.id)!);
  };
  delete = async (instance: Instance) => {
    await this.#play("delete", instance);
    this.machines.delete(instance.id);
  };
  inspect = async (instance: Instance): Promise<Reading> => {
    await this.#play("inspect", instance);
    return this.machines.get(instance.id) ?? { state: "Stopped", exit_code: null, exit_message: "not there" };
  };
  adopt = async (instance: Instance): Promise<Reading> => {
    await this.#play("adopt", instance);
    return await this.inspect(instance);
  };

  async #to(
    method: Method,
    instance: Instance,
    state: "Paused" | "Running" | "Standby" | "Initializing",
    signal?: AbortSignal,
  ) {
    await this.#play(method, instance, signal);
    this.machines.set(instance.id, { state });
  }

  async #play(method: Method, instance: Instance, signal = new AbortController().signal) {
    if (method !== "inspect") this.calls.push(method);
    await this.script[method]?.(instance, signal);
    signal.throwIfAborted();
  }
}

export interface Fixture {
  host: RunningHost;
  hypervisor: Hypervisor;
  driver: ScriptedDriver;
  events: LifecycleEvent[];
  /** Resolves with the next event that `wanted` accepts, one that is there already included. */
  event(wanted: (event: LifecycleEvent) => boolean): Promise<LifecycleEvent>;
}

/** A host with the real store and registry, and the scripted driver. */
export async function registryHost(
  t: TestContext,
  options: {
    folder?: string;
    driver?: ScriptedDriver;
    plugins?: Plugin[];
    table?: Record<string, unknown>;
    tables?: Record<string, Record<string, unknown>>;
  } = {},
): Promise<Fixture> {
  const { driver = new ScriptedDriver(), plugins = [], table = {} } = options;
  const events: LifecycleEvent[] = [];
  const watchers = new Set<() => void>();
  const scripted = definePlugin({
    name: "scripted",
    requires: ["hypervisor"],
    setup(host) {
      const registered = host.use("hypervisor").register(driver);
      host.defer(() => registered[Symbol.dispose]());
      host.hooks.on("instance:event", (event) => {
        events.push(event);
        for (const watcher of [...watchers]) watcher();
      }, { buffer: 100_000 });
    },
  });
  const tables = { ...options.tables, hypervisor: { default_driver: "scripted", ...table } };
  const all = [storePlugin, hypervisorPlugin, scripted, ...plugins] as Plugin[];
  const host = await startWith(t, all, { tables, ...(options.folder && { folder: options.folder }) });
  const event = (wanted: (event: LifecycleEvent) => boolean) =>
    new Promise<LifecycleEvent>((resolve) => {
      const check = () => {
        const found = events.find(wanted);
        if (!found) return;
        watchers.delete(check);
        resolve(found);
      };
      watchers.add(check);
      check();
    });
  return { host, hypervisor: host.use("hypervisor"), driver, events, event };
}

/** A gate that a script waits at: `arrived` when it got there, `open` to let it pass. */
export function gate(): { arrived: Promise<void>; open: () => void; script: Script } {
  const arrival = Promise.withResolvers<void>();
  const passage = Promise.withResolvers<void>();
  const script: Script = async (_instance, signal) => {
    arrival.resolve();
    const aborted = Promise.withResolvers<never>();
    signal.addEventListener("abort", () => aborted.reject(signal.reason), { once: true });
    await Promise.race([passage.promise, aborted.promise]);
  };
  return { arrived: arrival.promise, open: () => passage.resolve(), script };
}
