/**
 * Dormouse, the host. Read it top to bottom: what instances and drivers are, the hooks and services that plugins meet
 * through, the hook bus, the config, the loading and closing of plugins, and last `main`, which is all of it in order.
 */
import { join, resolve } from "node:path";
import process from "node:process";
import type { DatabaseSync } from "node:sqlite";
import { getLogger, type Logger } from "@logtape/logtape";
import * as v from "valibot";
import { commandHelp, readArguments, refuseUnknown, usage } from "./plugins/shared/arguments.ts";
import { deadline, isPromise } from "./plugins/shared/async.ts";
import { Closers } from "./plugins/shared/closers.ts";
import { check, type Config, Problems, readConfig } from "./plugins/shared/config.ts";
import type * as contracts from "./plugins/shared/contracts.ts";
import type { MaybePromise } from "./plugins/shared/contracts.ts";
import type * as features from "./plugins/shared/features.ts";
import { Channel } from "./plugins/shared/delivery.ts";
import { DormouseError, messageOf, reportOf, Veto } from "./plugins/shared/errors.ts";
import { configureLogging } from "./plugins/shared/logging.ts";
import { importPlugin, inOrder, neededFor } from "./plugins/shared/modules.ts";
import { nextSignal } from "./plugins/shared/signals.ts";

export type * from "./plugins/shared/contracts.ts";
export type * from "./plugins/shared/features.ts";
export { DormouseError, type ErrorCode, Veto } from "./plugins/shared/errors.ts";
export type { Lagged } from "./plugins/shared/delivery.ts";

export const VERSION = "0.1.0";
const ROOT = import.meta.dirname!;

// ------------------------------------------------------------------------------------------------- instances

// deno-fmt-ignore
export const STATES = ["Created", "Initializing", "Running", "Paused", "Shutdown", "Stopped", "Standby", "Unknown"] as const;
export type State = (typeof STATES)[number];

/** What can be asked of an instance; `state` is what happened to it by itself or on the way of another action. */
// deno-fmt-ignore
export type Action = "create" | "update" | "start" | "stop" | "pause" | "resume" | "standby" | "restore" | "delete" | "fork" | "state";

/** Who asked and why, on every action and event: `{ actor: "api", cause: "request" }`, `{ actor: "wake", ... }`. */
export interface Origin {
  actor: string;
  cause: string;
  detail?: Record<string, unknown>;
}

/**
 * An instance as it was at one commit. Never changed in place: each change makes a new one with the next `revision`, so
 * holding one is holding a snapshot. Times are milliseconds since the epoch, sizes are bytes.
 */
export interface Instance {
  readonly id: string;
  readonly name: string;
  readonly driver: string;
  readonly image: string;
  readonly entrypoint: readonly string[];
  readonly cmd: readonly string[];
  readonly env: Readonly<Record<string, string>>;
  readonly working_dir: string | null;
  readonly run_as: string | null;
  readonly tags: Readonly<Record<string, string>>;
  /** As asked for, else as the driver gives it; null where neither says, and then nothing is limited by it. */
  readonly vcpus: number | null;
  readonly memory_bytes: number | null;
  /** What the HTTP contract knows and only some drivers use: `overlay_size`, `hotplug_size`, `skip_guest_agent`. */
  readonly hints: Readonly<Record<string, string | boolean>>;
  readonly network: {
    readonly enabled: boolean;
    readonly ip: string | null;
    readonly mac: string | null;
    /** Null where there is no IPv6 for it. */
    readonly ip6: string | null;
  };
  readonly state: State;
  /** Why the state cannot be told; only with `Unknown`. */
  readonly state_error: string | null;
  /** The action under way, kept on disk so that a host that died in the middle of it can finish or undo it. */
  readonly transition: Action | null;
  readonly created_at: number;
  readonly started_at: number | null;
  readonly stopped_at: number | null;
  readonly expires_at: number | null;
  readonly exit_code: number | null;
  readonly exit_message: string | null;
  /** Finished phases in milliseconds; the current one began at `since`. Together they are the instance's whole life. */
  readonly phases: { readonly since: number; readonly totals: Readonly<Partial<Record<State, number>>> };
  /** Policies of the fields that plugins own, by field; see {@linkcode Hypervisor.extend}. */
  readonly policies: Readonly<Record<string, unknown>>;
  readonly revision: number;
}

/** One change; `seq` numbers changes and notes without gaps. An instance's chain: each `from` is the `to` before it. */
export interface LifecycleEvent {
  readonly seq: number;
  readonly at: number;
  readonly action: Action;
  readonly instance_id: string;
  readonly instance: Instance;
  readonly from: State | null;
  readonly to: State | null;
  readonly actor: string;
  readonly cause: string;
  readonly detail: Readonly<Record<string, unknown>>;
}

// --------------------------------------------------------------------------------------------------- drivers

/**
 * What a driver may lack. One that is not in its `features` is answered with 501, naming driver and feature. `queues`:
 * the kernel of an instance that sleeps still takes connections and keeps their bytes until it wakes. `host-network`: where
 * the network is off, an instance listens on this machine's own.
 */
export type Feature = "pause" | "standby" | "queues" | "host-network" | "fork" | "exec" | "stats" | "logs" | "stat";

/** What a driver sees when it looks: the truth that the registry's rows are checked against. */
export type Reading =
  | { state: "Initializing" | "Running" | "Paused" | "Standby" }
  | { state: "Stopped"; exit_code: number | null; exit_message: string | null }
  | { state: "Unknown"; error: string };

/**
 * Runs instances of one kind. The registry calls it under the instance's lock, so never twice at once for one instance.
 * It keeps what it must remember in its own files, under names made from the instance's id, so that `inspect` answers
 * after a host that died at any point. Every method may be called again after a crash and then finishes its work.
 */
export interface Driver {
  readonly name: string;
  readonly features: ReadonlySet<Feature>;
  /** Why it cannot run anything here, or null when it can. */
  unavailable(): string | null;
  /** Refuses what it could not run, before anything is made; returns the size that it gives. @throws {DormouseError} 4xx */
  validate(instance: Instance): contracts.Size | void | Promise<contracts.Size | void>;
  /** Makes what outlives a stop: folders, disks. */
  create(instance: Instance): Promise<void>;
  /** Resolves once it runs; `Initializing` when it reports ready later, by {@linkcode Hypervisor.changed}. */
  start(instance: Instance, signal: AbortSignal): Promise<"Initializing" | "Running">;
  /** Asks it to end, and ends it after a grace. Works on a paused and a sleeping instance too. */
  stop(instance: Instance, signal: AbortSignal): Promise<{ exit_code: number | null; exit_message: string | null }>;
  /** Removes everything, whatever state it is in; what is already gone is no error. */
  delete(instance: Instance): Promise<void>;
  inspect(instance: Instance): Promise<Reading>;
  /** Takes over what still runs from a host before this one, and reads it. */
  adopt(instance: Instance): Promise<Reading>;
  pause?(instance: Instance): Promise<void>;
  resume?(instance: Instance): Promise<void>;
  /** An abort before the point of no return puts the instance back to running and rejects with the signal's reason. */
  standby?(instance: Instance, signal: AbortSignal): Promise<void>;
  restore?(instance: Instance, signal: AbortSignal): Promise<"Initializing" | "Running">;
  fork?(source: Instance, target: Instance): Promise<void>;
  exec?(instance: Instance, request: contracts.ExecRequest): Promise<contracts.ExecResult>;
  stats?(instance: Instance): Promise<contracts.Stats>;
  stat?(instance: Instance, path: string, follow: boolean): Promise<contracts.PathInfo>;
  logs?(instance: Instance, request: contracts.LogRequest): AsyncIterable<string>;
}

// ---------------------------------------------------------------------------------------------------- hooks

/** Runs before an action is begun, one handler after the other, higher `priority` first, each with a deadline. */
export type Guard<P> = { kind: "guard"; payload: P };
/** Runs synchronously inside the database transaction of a change or a note. */
export type Commit<P> = { kind: "commit"; payload: P };
/** Reaches every subscriber through its own bounded queue, in order, after the fact. */
export type Event<P> = { kind: "event"; payload: P };

/** What a guard of an action sees. `signal` aborts when the action is overtaken or the guard is late. */
export interface GuardContext {
  readonly instance: Instance;
  /** What an update would make of it; absent for other actions. */
  readonly updated?: Instance;
  readonly origin: Origin;
  readonly signal: AbortSignal;
}
/** What a commit hook sees. `before` is null for a creation, `after` for a deletion. */
export interface CommitContext {
  readonly event: LifecycleEvent;
  readonly before: Instance | null;
  readonly after: Instance | null;
}
/**
 * The whole vocabulary. A plugin adds its own by declaration merging on this interface.
 *
 * | kind | order | may veto | a throw |
 * |---|---|---|---|
 * | guard | serial, by priority, under the instance's lock | yes: throw {@linkcode Veto} | aborts the action |
 * | commit | by priority, synchronous, in the transaction | no | rolls the change back |
 * | event | per subscriber, in order, after the commit | no | logged and counted, nobody else notices |
 */
export interface Hooks {
  /** Every plugin is set up; the API is not listening yet. A throw ends the start-up. */
  "host:ready": Guard<{ signal: AbortSignal }>;
  /** A create starts its instance too, and asks nobody else. */
  "before:create": Guard<GuardContext>;
  "before:update": Guard<GuardContext>;
  "before:start": Guard<GuardContext>;
  "before:stop": Guard<GuardContext>;
  "before:pause": Guard<GuardContext>;
  "before:resume": Guard<GuardContext>;
  /** Also the moment to put the wake path in place: the instance still serves. */
  "before:standby": Guard<GuardContext>;
  "before:restore": Guard<GuardContext>;
  "before:delete": Guard<GuardContext>;
  "before:fork": Guard<GuardContext>;
  /** In the transaction of every change, after the row is written and before it is committed. */
  "instance:commit": Commit<CommitContext>;
  /** In the transaction of every note. */
  "note:commit": Commit<features.Note>;
  /** Every change, after it is on disk. */
  "instance:event": Event<LifecycleEvent>;
}

type NamesOf<K extends string> = { [N in keyof Hooks]: Hooks[N] extends { kind: K } ? N : never }[keyof Hooks];
export type GuardName = NamesOf<"guard">;
export type CommitName = NamesOf<"commit">;
export type EventName = NamesOf<"event">;
type PayloadOf<N extends keyof Hooks> = Hooks[N]["payload"];

/** The hook bus as a plugin sees it: what it registers is undone when it closes, commit hooks when all have. */
export interface PluginHooks {
  guard<N extends GuardName>(
    name: N,
    handler: (payload: PayloadOf<N>) => MaybePromise<void>,
    options?: contracts.GuardOptions,
  ): Disposable;
  commit<N extends CommitName>(
    name: N,
    handler: (payload: PayloadOf<N>) => void,
    options?: { priority?: number },
  ): Disposable;
  on<N extends EventName>(
    name: N,
    handler: (payload: PayloadOf<N>) => MaybePromise<void>,
    options?: contracts.EventOptions,
  ): Disposable;
  ask<N extends GuardName>(name: N, payload: PayloadOf<N>): Promise<void>;
  apply<N extends CommitName>(name: N, payload: PayloadOf<N>): void;
  publish<N extends EventName>(name: N, payload: PayloadOf<N>): void;
  stats(): contracts.ConsumerStats[];
}

// ------------------------------------------------------------------------------------------------- services

/** The one SQLite database. */
export interface Store {
  readonly db: DatabaseSync;
  /** Brings the owner's tables up to date: each step runs once, ever. @throws store_newer, store_changed */
  migrate(owner: string, steps: readonly string[]): void;
  /** Runs `work` in a transaction, durable when it returns; inside another it joins that one. */
  transaction<T>(work: () => T): T;
  /** For what is kept in memory too: `undo` is called where the transaction under way is rolled back. */
  onRollback(undo: () => void): void;
}

/**
 * The registry of instances. Every action runs under the instance's lock, joins one of the same kind that is waiting
 * or under way, and returns at once, without an event, where the instance is already as asked.
 */
export interface Hypervisor {
  /** Undone asynchronously, it lets what is under way with the driver end first. */
  register(driver: Driver): Disposable & AsyncDisposable;
  drivers(): Driver[];
  /** The name of the driver for bodies that name none. */
  readonly defaultDriver: string;
  /** The instance's driver, checked for a feature. @throws not_supported */
  driverOf<F extends Feature>(instance: Instance, feature?: F): Driver & Required<Pick<Driver, F & keyof Driver>>;
  extend<P, R = never>(extension: contracts.FieldExtension<P, R>): contracts.Extension<P, R>;
  /** By id, name or unique id prefix. @throws not_found, ambiguous */
  resolve(reference: string): Instance;
  find(id: string): Instance | undefined;
  list(filter?: contracts.InstanceFilter): Instance[];
  create(body: unknown, origin: Origin): Promise<Instance>;
  update(id: string, body: unknown, origin: Origin): Promise<Instance>;
  start(id: string, origin: Origin, override?: { entrypoint?: string[]; cmd?: string[] }): Promise<Instance>;
  stop(id: string, origin: Origin): Promise<Instance>;
  pause(id: string, origin: Origin): Promise<Instance>;
  resume(id: string, origin: Origin): Promise<Instance>;
  standby(id: string, origin: Origin, request?: contracts.StandbyRequest): Promise<Instance>;
  restore(id: string, origin: Origin): Promise<Instance>;
  fork(id: string, body: unknown, origin: Origin): Promise<Instance>;
  delete(id: string, origin: Origin): Promise<void>;
  /** What a plugin's notes are about, by type: what clients may ask for. @throws {TypeError} where a type is taken */
  declareNotes(kinds: Readonly<Record<string, features.NoteKind>>): Disposable;
  noteKinds(): ReadonlyMap<string, features.NoteKind>;
  /** Adds what is no change to an instance's history, with what `within` writes, unless it is gone. Not from a change. */
  note(id: string, draft: features.NoteDraft, within?: () => void): features.Note | undefined;
  /** A driver noticed something: look again soon, under the lock, and commit what changed. */
  changed(id: string, cause: string): void;
  wait(id: string, target: State, options: { timeout: number; signal?: AbortSignal }): Promise<contracts.WaitResult>;
  /** Bodies and response with the fields of all plugins; complete once `host:ready` runs. */
  schemas(): { create: v.GenericSchema; update: v.GenericSchema; fork: v.GenericSchema; instance: v.GenericSchema };
  /** The instance as the API shows it. */
  present(instance: Instance): Record<string, unknown>;
  /** The same as JSON text, made once per revision; a list of thousands costs little more than its bytes. */
  presentJson(instance: Instance): string;
}

/** How an instance reaches the network; `reason` is what is missing when it is not enabled. */
export interface Network {
  readonly enabled: boolean;
  readonly reason: string | null;
  readonly bridge: string;
  readonly subnet: string;
  readonly gateway: string;
  /** Null where instances have IPv4 only. */
  readonly subnet6: string | null;
  readonly gateway6: string | null;
  /** Reserves an address, in the caller's transaction; the same one when asked again. @throws insufficient_resources */
  allocate(id: string): { ip: string; mac: string; ip6: string | null };
  /** Frees it, in the caller's transaction. */
  release(id: string): void;
  /** Makes the instance's namespace and its veth into the bridge; the name of the namespace. Repeats are no error. */
  attach(instance: Instance): Promise<{ namespace: string; host_device: string }>;
  /** Makes a TAP into the bridge that a program of `uid` may open; its name. What is plugged in gets the instance's mac. */
  attachTap(instance: Instance, uid: number): Promise<string>;
  detach(instance: Instance): Promise<void>;
}

export interface Api {
  /** Adds a route; possible until `host:ready` has run. */
  route(route: contracts.ApiRoute): void;
  /** Answers with a stream that ends when `work` does, the client leaves or the host closes. @throws rate_limited */
  stream(call: contracts.ApiCall, work: (stream: features.EventStream) => MaybePromise<void>): Response;
  /** Where it listens, known once the host is up: `http://127.0.0.1:8080`. */
  readonly url: string;
}

/** What plugins provide to each other. A plugin adds its own by declaration merging. */
export interface Services {
  store: Store;
  hypervisor: Hypervisor;
  network: Network;
  api: Api;
  /** The kernel's table of connections. */
  conntrack: contracts.Conntrack;
}
export type ServiceName = keyof Services;

// -------------------------------------------------------------------------------------------------- plugins

/** What a plugin is given. Everything registered through it is undone when the plugin closes. */
export interface Host {
  readonly version: string;
  /** Carries the plugin's name: `host.log.info("Slept {id}", { id })`. */
  readonly log: Logger;
  /** Aborts when the host begins to close. */
  readonly signal: AbortSignal;
  readonly hooks: PluginHooks;
  /** Absolute; a plugin keeps its files in a folder of its own below it. */
  readonly dataDir: string;
  /** Of every plugin that is turned on, in the order of their setup; true once set up. */
  readonly plugins: ReadonlyMap<string, boolean>;
  use<S extends ServiceName>(service: S): Services[S];
  /** The same for a service that is required as `name?`: undefined where no plugin provides it. */
  find<S extends ServiceName>(service: S): Services[S] | undefined;
  provide<S extends ServiceName>(service: S, implementation: Services[S]): void;
  /** Runs when the plugin closes, last in first out. */
  defer(close: () => MaybePromise<void>): void;
  /** An error with a code, and a refusal, for plugins that import nothing. */
  error(code: DormouseError["code"], message: string): DormouseError;
  veto(code: string, reason: string): Veto;
}

export interface Plugin<O = unknown> {
  name: string;
  /** Services it uses; `"network?"` where it can do without. */
  requires?: readonly (ServiceName | `${ServiceName}?`)[];
  provides?: readonly ServiceName[];
  /** Of its `[plugins.NAME]` table, without `enabled` and `use`. No schema, no options. */
  options?: contracts.Schema<O>;
  /** Work that `main.ts --NAME` does in place of the host, with what the plugin requires; `alone`, beside a host too. */
  commands?: Record<string, { help: string; alone?: boolean; run(host: Host, options: O): MaybePromise<void> }>;
  setup(host: Host, options: O): MaybePromise<void>;
}

/** Returns its argument: it is here so that the options' type is inferred from their schema. */
export function definePlugin<O = Record<string, never>>(plugin: Plugin<O>): Plugin<O> {
  return plugin;
}

// ------------------------------------------------------------------------------------------------------ bus

interface Handler {
  owner: string;
  priority: number;
  timeout: number;
  call(payload: unknown): MaybePromise<void>;
  /** Calls under way. */
  busy: Set<Promise<void>>;
  /** A call that goes over a list of handlers passes over those that were undone meanwhile. */
  undone: boolean;
}
type Undo = () => MaybePromise<void>;
interface EventHook {
  channel: Channel<unknown>;
  consumers: Map<string, { dropped: number; errors: number }>;
}

/** The hook bus. Plugins see it as {@linkcode PluginHooks}, each through a view of its own that {@linkcode view} makes. */
export class HookBus {
  /** Lists are replaced, never changed: a call in progress goes on over the list that it began with. */
  #handlers = new Map<string, readonly Handler[]>();
  #events = new Map<string, EventHook>();
  readonly commits = new Closers(); // undone last: an action under way is concluded after plugins have closed
  readonly #buffer: number;
  readonly #timeout: number;

  /** `buffer` in events, `timeout` of a guard in milliseconds. */
  constructor({ buffer = 256, timeout = 10_000 } = {}) {
    this.#buffer = buffer;
    this.#timeout = timeout;
  }

  /** The bus for one plugin: `owner` in errors and statistics, each undo added to `closers` until it is used. */
  view(owner: string, closers = new Closers()): PluginHooks {
    const undoable = (undo: Undo, undos = closers): Disposable => {
      const forget = undos.add(undo);
      return { [Symbol.dispose]: () => (forget(), void undo()) };
    };
    return {
      guard: (name, call, { priority = 0, timeout = this.#timeout } = {}) =>
        undoable(this.#add(name, owner, call as Handler["call"], priority, timeout)),
      commit: (name, call, { priority = 0 } = {}) =>
        undoable(this.#add(name, owner, call as Handler["call"], priority), this.commits),
      on: (name, call, options = {}) => undoable(this.#subscribe(name, owner, call as Handler["call"], options)),
      ask: (name, payload) => this.#ask(name, payload),
      apply: (name, payload) => this.#apply(name, payload),
      publish: (name, payload) => this.#event(name).channel.publish(payload),
      stats: () => this.stats(),
    };
  }

  /** Resolves once every event that was published has been handled, those that handlers publish included. */
  async idle(): Promise<void> {
    for (let waited = [true]; waited.includes(true);) {
      waited = await Promise.all([...this.#events.values()].map(({ channel }) => channel.idle()));
    }
  }

  stats(): contracts.ConsumerStats[] {
    return [...this.#events].flatMap(([hook, { consumers, channel }]) =>
      [...consumers].map(([consumer, counts]) => {
        const own = channel.deliveries.filter((delivery) => delivery.consumer === consumer);
        return { hook, consumer, subscribers: own.length, deepest: Math.max(0, ...own.map((d) => d.depth)), ...counts };
      })
    );
  }

  #add(name: string, owner: string, call: Handler["call"], priority: number, timeout = 0): Undo {
    const handler: Handler = { owner, priority, timeout, call, busy: new Set(), undone: false };
    const list = [...this.#handlers.get(name) ?? [], handler].sort((a, b) => b.priority - a.priority);
    this.#handlers.set(name, list);
    return async () => {
      handler.undone = true;
      this.#handlers.set(name, this.#handlers.get(name)!.filter((other) => other !== handler));
      await Promise.allSettled(handler.busy);
    };
  }

  async #ask(name: string, payload: unknown): Promise<void> {
    for (const handler of this.#handlers.get(name) ?? []) {
      const { owner, timeout, call, busy } = handler;
      try {
        const pending = handler.undone ? undefined : call(payload);
        if (!isPromise(pending)) continue;
        const settled = Promise.resolve(pending).finally(() => busy.delete(settled));
        busy.add(settled);
        await deadline(settled, timeout, "it");
      } catch (error) {
        // By name, so that a plugin that lives elsewhere and imports nothing can veto too.
        if (error instanceof Error && error.name === "Veto") {
          const details = { plugin: owner, code: (error as Veto).code, reason: error.message };
          const message = `Refused by plugin "${owner}": ${error.message}`;
          throw new DormouseError("vetoed", message, { cause: error, details });
        }
        if (error instanceof DormouseError) throw error;
        const message = `Guard "${name}" of plugin "${owner}" failed: ${messageOf(error)}`;
        throw new DormouseError("guard_failed", message, { cause: error });
      }
    }
  }

  #apply(name: string, payload: unknown): void {
    for (const { owner, undone, call } of this.#handlers.get(name) ?? []) {
      const pending: unknown = undone ? undefined : call(payload);
      if (!isPromise(pending)) continue;
      pending.then(undefined, (error) => log.error("Commit hook {name} of {owner} failed", { name, owner, error }));
      throw new TypeError(`Commit hook "${name}" of plugin "${owner}" returned a promise`);
    }
  }

  #event(name: string): EventHook {
    let event = this.#events.get(name);
    if (!event) this.#events.set(name, event = { channel: new Channel(), consumers: new Map() });
    return event;
  }

  #subscribe(hook: string, owner: string, handle: Handler["call"], options: contracts.EventOptions): Undo {
    const { consumer = owner, buffer = this.#buffer } = options;
    const { channel, consumers } = this.#event(hook);
    const counts = consumers.get(consumer) ?? { dropped: 0, errors: 0 };
    consumers.set(consumer, counts);
    const lagged = options.lagged ??
      ((gap) => log.warn("Consumer {consumer} of {hook} missed {from} to {to}", { consumer, hook, ...gap }));
    const failed = (error: unknown) => {
      const reason = messageOf(error);
      log.error("Handler of {hook} in {consumer} failed: {reason}", { hook, consumer, reason, error });
    };
    const delivery = channel.subscribe(handle, { consumer, buffer, counts, lagged, failed });
    return () => channel.unsubscribe(delivery);
  }
}

// --------------------------------------------------------------------------------------------------- the host

const log = getLogger(["dormouse", "host"]);

/** A plugin that is loaded, with its checked options and what it registered. */
interface Loaded {
  plugin: Plugin;
  options: unknown;
  closers: Closers;
}

/** A host that is up. */
export interface RunningHost extends AsyncDisposable {
  readonly hooks: PluginHooks;
  use<S extends ServiceName>(service: S): Services[S];
  /** Closes every plugin, the last that was set up first. Twice is once. */
  close(): Promise<void>;
}

/**
 * Imports the plugins of a config, checks their shape and options, and puts them in the order in which they need each
 * other. Tests hand in plugins of their own by name.
 *
 * @throws {DormouseError} the `plugin_*` codes; `config_invalid` with every problem of every plugin's options
 */
export async function loadPlugins(
  config: Config,
  { problems = new Problems("config"), given = new Map<string, Plugin>() } = {},
): Promise<Loaded[]> {
  const folder = join(ROOT, "plugins");
  const loaded: Loaded[] = [];
  for (const { name, use, options } of config.plugins) {
    const plugin = given.get(name) ??
      await importPlugin(folder, name, use).catch((error) => problems.include(name, error));
    if (!plugin) continue;
    loaded.push({
      plugin,
      options: check(plugin.options ?? v.object({}), options, `plugins.${name}`, problems),
      closers: new Closers(),
    });
  }
  problems.throwIfAny();
  return inOrder(loaded);
}

/**
 * Sets the plugins up in order, tells them that all are ready, and returns the host. Where one fails, those that were
 * already up are closed first. With a `command` it sets up only what the command's plugin requires, and runs that.
 *
 * @throws {DormouseError} `plugin_failed`, `plugin_timeout`, or the code that the plugin's own error carries
 */
export async function startHost(config: Config, plugins: Loaded[], command?: string): Promise<RunningHost> {
  const loaded = command === undefined ? plugins : neededFor(plugins, command);
  const bus = new HookBus({ buffer: config.host.event_buffer, timeout: config.host.guard_timeout });
  const services = new Map<string, unknown>();
  const closing = new AbortController();
  const up = new Map(loaded.map(({ plugin }) => [plugin.name, false]));

  let closed: Promise<void> | undefined;
  const close = () => closed ??= closeAll();
  async function closeAll(): Promise<void> {
    const end = performance.now() + config.host.close_timeout;
    const step = async (name: string, work: () => MaybePromise<void>, share = 1) => {
      const left = Math.max(Math.round((end - performance.now()) * share), 100);
      try {
        await deadline(Promise.resolve().then(work), left, "it");
      } catch (error) {
        log.error("Closing {name} failed: {reason}", { name, reason: messageOf(error), error });
      }
    };
    closing.abort(new DormouseError("shutting_down", "The host is closing"));
    for (const { plugin, closers } of loaded.toReversed()) {
      // What it published reaches who listens; a handler that is stuck leaves the others some of the time.
      if (closers.size > 0) await step("the event queues", () => bus.idle(), 0.5);
      await closers.close((closer) => step(plugin.name, closer));
      up.set(plugin.name, false);
    }
    await bus.commits.close((closer) => step("the commit hooks", closer));
  }

  for (const { plugin, options, closers } of loaded) {
    const host = hostOf(plugin, closers, { bus, services, signal: closing.signal, dataDir: config.dataDir, up });
    try {
      if (command !== undefined && plugin.commands?.[command]) {
        await plugin.commands[command].run(host, options);
        continue;
      }
      await deadline(Promise.resolve().then(() => plugin.setup(host, options)), config.host.setup_timeout, "it");
      const absent = plugin.provides?.find((service) => !services.has(service));
      if (absent) throw new TypeError(`it did not provide "${absent}"`);
      up.set(plugin.name, true);
    } catch (error) {
      await close();
      throw named(command && plugin.commands?.[command] ? `run --${command} of` : "set up", plugin.name, error);
    }
  }
  const hooks = bus.view("host");
  try {
    if (command === undefined) await hooks.ask("host:ready", { signal: closing.signal });
  } catch (error) {
    await close();
    throw error;
  }
  return { hooks, use: (service) => services.get(service) as never, close, [Symbol.asyncDispose]: close };
}

function named(verb: string, plugin: string, error: unknown): DormouseError {
  const late = error instanceof DOMException && error.name === "TimeoutError";
  const code = error instanceof DormouseError ? error.code : late ? "plugin_timeout" : "plugin_failed";
  return new DormouseError(code, `Cannot ${verb} plugin "${plugin}": ${messageOf(error)}`, { cause: error });
}

interface Shared {
  bus: HookBus;
  services: Map<string, unknown>;
  signal: AbortSignal;
  dataDir: string;
  up: ReadonlyMap<string, boolean>;
}

function hostOf({ name, requires = [], provides = [] }: Plugin, closers: Loaded["closers"], shared: Shared): Host {
  const { bus, services, signal, dataDir, up } = shared;
  const find: Host["find"] = (service) => {
    if (requires.some((required) => required === service || required === `${service}?`)) {
      return services.get(service) as never;
    }
    throw new TypeError(`Plugin "${name}" uses "${service}" without requiring it`);
  };
  return {
    version: VERSION,
    log: getLogger(["dormouse", name]),
    signal,
    dataDir,
    plugins: up,
    hooks: bus.view(name, closers),
    find,
    use: (service) => {
      const implementation = find(service);
      if (!implementation) {
        throw new TypeError(`Plugin "${name}" uses "${service}", which is not there: require it without "?"`);
      }
      return implementation as never;
    },
    provide: (service, implementation) => {
      if (!provides.includes(service)) throw new TypeError(`Plugin "${name}" provides "${service}" without saying so`);
      services.set(service, implementation);
      closers.add(() => void services.delete(service));
    },
    defer: (closer) => void closers.add(closer),
    error: (code, message) => new DormouseError(code, message),
    veto: (code, reason) => new Veto(code, reason),
  };
}

// ----------------------------------------------------------------------------------------------------- main

/** Arguments, config, plugins in order, ready, wait for a signal, close: the whole program. Returns the exit code. */
async function main(argv: string[]): Promise<number> {
  const { file: given, command, ...only } = readArguments(argv);
  if (only.version) return console.log(VERSION), 0;
  const file = resolve(given ?? join(ROOT, "config", "config.toml"));
  if (only.help) console.log(usage(VERSION));
  const { config, problems } = readConfig(file, { env: process.env, dataDir: join(ROOT, "data") });
  const loaded = await loadPlugins(config, { problems });
  const commands: NonNullable<Plugin["commands"]> = Object.assign({}, ...loaded.map(({ plugin }) => plugin.commands));
  if (only.help) return console.log(commandHelp(commands)), 0;
  refuseUnknown(command, Object.keys(commands));
  const names = loaded.map(({ plugin }) => plugin.name);
  if (only.check) return console.log(`${file}: ok, plugins ${names.join(", ") || "none"}`), 0;
  configureLogging({ level: config.host.log_level, format: config.host.log_format });
  // Before the start, so that a signal in the middle of it closes what is up; a command is simply ended by one.
  const stop = command === undefined ? nextSignal() : undefined;
  void stop?.then(nextSignal).then(() => process.exit(130));
  const host = await startHost(config, loaded, command);
  if (stop) log.info("Closing on {signal}; instances go on running", { signal: await stop });
  await host.close();
  return 0;
}

// Not a top-level await: plugins import this module, which would then never finish loading.
if (import.meta.main) {
  main(process.argv.slice(2)).then((code) => process.exit(code), (error) => {
    console.error(reportOf(error));
    process.exit(1);
  });
}
