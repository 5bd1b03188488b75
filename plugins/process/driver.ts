import { existsSync, mkdirSync, readdirSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import type { Logger } from "@logtape/logtape";
import type { Driver, ExecRequest, ExecResult, Feature, Instance, LogRequest } from "../../main.ts";
import { DormouseError, type Network, type PathInfo, type Reading, type Stats } from "../../main.ts";
import { messageOf } from "../shared/errors.ts";
import { Hierarchy, ownerOf } from "../shared/hierarchy.ts";
import {
  type Command,
  commandOf,
  findTools,
  type NetworkOf,
  type Powers,
  powersOf,
  rootOf,
  type Tools,
  type Wanted,
} from "./command.ts";
import { Execs } from "./exec.ts";
import { Exits } from "./exits.ts";
import type { Exit } from "./launch.ts";
import { LogKeeper } from "../shared/log-keeper.ts";
import { Reclaims } from "./reclaims.ts";
import { pathInfo } from "./root.ts";
import { statsOf } from "./stats.ts";
import { type Place, Workload } from "./workload.ts";

export interface ProcessOptions {
  /** Milliseconds from SIGTERM to SIGKILL. */
  grace: number;
  /** Bytes from which an instance's log is rotated. */
  log_max_size: number;
  log_files: number;
  /** The name of the cgroup that holds all others; empty for none. */
  cgroup_parent: string;
  /** PATH of instances that have none of their own. */
  path: string;
}

export interface ProcessContext {
  dataDir: string;
  network: Network | undefined;
  log: Logger;
  /** Told that an instance should be looked at. */
  changed(id: string, cause: string): void;
  options: ProcessOptions;
}

const FEATURES: Feature[] = ["pause", "standby", "queues", "host-network", "fork", "exec", "stats", "stat", "logs"];

/** Runs programs of this machine as instances, each in its own cgroup and network namespace where we may make them. */
export class ProcessDriver implements Driver, AsyncDisposable {
  readonly name = "process";
  readonly features = new Set(FEATURES);
  readonly #context: ProcessContext;
  readonly #powers: Powers;
  readonly #tools: Tools | string;
  readonly #place: Place;
  readonly #logs: LogKeeper;
  readonly #execs = new Execs();
  readonly #reclaims: Reclaims;

  constructor(context: ProcessContext) {
    const { dataDir, log, options } = context;
    this.#context = context;
    this.#powers = process.platform === "linux" ? powersOf() : { users: false, roots: false, namespaces: false };
    this.#tools = findTools(process.env.PATH ?? "", this.#powers);
    const base = join(dataDir, "process");
    const folder = join(base, "instances");
    mkdirSync(folder, { recursive: true });
    const exits = new Exits(join(base, "exits"), log, (id) => this.#exited(id));
    const owner = ownerOf(folder);
    const hierarchy = Hierarchy.find(options.cgroup_parent, owner, { root: process.getuid?.() === 0 });
    const setsid = typeof this.#tools === "string" ? "setsid" : this.#tools.setsid;
    this.#place = { folder, owner, hierarchy: hierarchy instanceof Hierarchy ? hierarchy : undefined, exits, setsid };
    if (!this.#place.hierarchy) {
      log.warn("No cgroups, so no limits, and daemons may outlive their instance: {reason}", { reason: hierarchy });
    }
    this.#reclaims = new Reclaims(log);
    this.#logs = new LogKeeper({ maxSize: options.log_max_size, files: options.log_files }, log);
  }

  unavailable(): string | null {
    if (process.platform !== "linux") return `it needs Linux, this is ${process.platform}`;
    return typeof this.#tools === "string" ? `program "${this.#tools}" is not in PATH` : null;
  }

  async validate(instance: Instance): Promise<void> {
    await this.#command(wantedOf(instance), null);
  }

  async create({ id }: Instance): Promise<void> {
    this.#workload(id).records.make();
  }

  async start(instance: Instance, signal: AbortSignal): Promise<"Running"> {
    signal.throwIfAborted();
    const { id, name, memory_bytes, vcpus } = instance;
    const workload = this.#workload(id);
    const reading = await workload.look();
    if (reading.state === "Paused" || reading.state === "Standby") await workload.thaw();
    if (reading.state !== "Stopped") return this.#logs.watch(id), "Running";
    workload.records.make();
    await this.#logs.of(id, workload.records.log).recover();
    const { network, device } = await this.#wire(instance);
    const command = await this.#command(wantedOf(instance), network);
    const isolated = network !== null;
    const lacking = await workload.start(command, { memory_bytes, vcpus, isolated, device, signal });
    if (lacking.length > 0) {
      const controllers = lacking.join(" and ");
      this.#context.log.warn("No limits of {controllers} for {name}: no such cgroup controller", {
        controllers,
        name,
        id,
      });
    }
    this.#logs.watch(id);
    return "Running";
  }

  async stop({ id }: Instance, signal: AbortSignal): Promise<Exit> {
    await this.#leave(id);
    return await this.#workload(id).stop(this.#context.options.grace, signal);
  }

  async delete(instance: Instance): Promise<void> {
    const { id } = instance;
    await this.#leave(id);
    await this.#workload(id).end();
    if (instance.network.enabled) await this.#context.network?.detach(instance);
    await this.#erase(id);
  }

  async inspect({ id }: Instance): Promise<Reading> {
    try {
      return await this.#workload(id).look();
    } catch (error) {
      return { state: "Unknown", error: messageOf(error) };
    }
  }

  async adopt(instance: Instance): Promise<Reading> {
    const workload = this.#workload(instance.id);
    try {
      await workload.settle();
      await this.#logs.of(instance.id, workload.records.log).recover();
    } catch (error) {
      return { state: "Unknown", error: messageOf(error) };
    }
    const reading = await this.inspect(instance);
    if (reading.state === "Running" || reading.state === "Paused") this.#logs.watch(instance.id);
    return reading;
  }

  async pause({ id }: Instance): Promise<void> {
    await this.#workload(id).freeze("Paused");
  }

  async resume({ id }: Instance): Promise<void> {
    await this.#workload(id).thaw();
  }

  async standby({ id }: Instance, signal: AbortSignal): Promise<void> {
    const enclosure = await this.#workload(id).freeze("Standby", signal);
    this.#logs.unwatch(id);
    this.#reclaims.begin(id, enclosure);
  }

  async restore({ id }: Instance, signal: AbortSignal): Promise<"Running"> {
    signal.throwIfAborted();
    void this.#reclaims.end(id);
    await this.#workload(id).thaw();
    this.#logs.watch(id);
    return "Running";
  }

  /** A process cannot be copied while it is there; of one that is stopped, there is nothing but its row. */
  async fork(source: Instance, target: Instance): Promise<void> {
    const { state } = await this.#workload(source.id).look();
    if (state !== "Stopped") {
      const message = `Cannot fork instance "${source.name}": state is ${state}, and a process is forked when Stopped`;
      throw new DormouseError("invalid_state", message);
    }
    await this.create(target);
  }

  async exec(instance: Instance, request: ExecRequest): Promise<ExecResult> {
    const { id, name } = instance;
    const running = this.#workload(id).running();
    const { state } = await this.#workload(id).look();
    if (!running || state !== "Running") {
      throw new DormouseError("invalid_state", `Cannot exec in instance "${name}": state is ${state}`);
    }
    const wanted: Wanted = {
      ...wantedOf(instance),
      field: "command",
      argv: request.command,
      working_dir: request.working_dir ?? instance.working_dir,
      env: { ...instance.env, ...request.env },
    };
    const network = running.launch.isolated ? { file: `/proc/${running.main.pid}/ns/net` } : null;
    const command = await this.#command(wanted, network);
    return await this.#execs.run(id, command, running.enclosure.joins, request);
  }

  async stats({ id, name }: Instance): Promise<Stats> {
    const running = this.#workload(id).running();
    if (running) return statsOf(running.enclosure, running.launch.device);
    throw new DormouseError("invalid_state", `Cannot read stats of instance "${name}": nothing of it runs`);
  }

  async stat(instance: Instance, path: string, follow: boolean): Promise<PathInfo> {
    try {
      return pathInfo(rootOf(instance), path, follow);
    } catch (error) {
      const message = `Cannot stat "${path}" in instance "${instance.name}": ${messageOf(error)}`;
      throw new DormouseError("invalid_request", message, { cause: error });
    }
  }

  /** @throws {DormouseError} `log_not_found`, at once and not with the first line */
  logs({ id, name }: Instance, { source, tail, follow, signal }: LogRequest): AsyncIterable<string> {
    const { log } = this.#workload(id).records;
    if (source !== "app" || !existsSync(log)) {
      throw new DormouseError("log_not_found", `No log of source "${source}" for instance "${name}"`);
    }
    return this.#logs.of(id, log).lines({ tail, follow, signal });
  }

  /**
   * Removes what belongs to no instance of `live`: processes, cgroups, folders. Returns their ids. Only while no instance
   * is being made.
   */
  async sweep(live: ReadonlySet<string>): Promise<string[]> {
    const { folder, exits, hierarchy } = this.#place;
    const exited = readdirSync(exits.folder).map((name) => name.split(".")[0]);
    const found = new Set([...readdirSync(folder), ...exited, ...hierarchy?.ids() ?? []]);
    const strays = [...found].filter((id) => !live.has(id) && /^[\w-]+$/.test(id));
    for (const id of strays) await this.#erase(id);
    return strays;
  }

  /** Lets go of everything; what runs goes on running. */
  async [Symbol.asyncDispose](): Promise<void> {
    this.#place.exits[Symbol.dispose]();
    await this.#logs[Symbol.asyncDispose]();
    await this.#reclaims[Symbol.asyncDispose]();
    this.#place.hierarchy?.tidy();
  }

  #workload(id: string): Workload {
    return new Workload(this.#place, id);
  }

  async #erase(id: string): Promise<void> {
    await this.#logs.forget(id);
    await this.#workload(id).erase();
    await this.#logs.forget(id); // somebody may have read it meanwhile
  }

  /** @throws {DormouseError} `invalid_request` */
  async #command(wanted: Wanted, network: NetworkOf): Promise<Command> {
    if (typeof this.#tools === "string") throw new DormouseError("driver_failed", `Cannot run: ${this.unavailable()}`);
    return await commandOf(wanted, network, {
      tools: this.#tools,
      powers: this.#powers,
      path: this.#context.options.path,
    });
  }

  async #wire(instance: Instance): Promise<{ network: NetworkOf; device: string | null }> {
    const { network } = this.#context;
    if (!network?.enabled) return { network: null, device: null };
    // It asked for none, and what it is spared must not be the whole network of this machine.
    if (!instance.network.enabled) return { network: "none", device: null };
    const { namespace, host_device } = await network.attach(instance);
    return { network: { file: `/run/netns/${namespace}` }, device: host_device };
  }

  async #leave(id: string): Promise<void> {
    this.#logs.unwatch(id);
    this.#execs.end(id, new DormouseError("aborted", "Cannot go on with exec: the instance is stopped"));
    await this.#reclaims.end(id);
  }

  #exited(id: string): void {
    const { log, changed } = this.#context;
    this.#logs.unwatch(id);
    // Where there is no cgroup, nobody has ended yet what it left behind.
    if (!this.#place.hierarchy && /^[\w-]+$/.test(id)) {
      this.#workload(id).endRest().catch((error) => log.warn("Cannot end what {id} left", { id, error }));
    }
    changed(id, "exit");
  }
}

function wantedOf({ image, env, working_dir, run_as, entrypoint, cmd }: Instance): Wanted {
  return { image, env, working_dir, run_as, argv: [...entrypoint, ...cmd], field: "cmd" };
}
