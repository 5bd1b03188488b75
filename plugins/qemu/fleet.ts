import { existsSync, mkdirSync, readdirSync } from "node:fs";
import { join } from "node:path";
import type { Logger } from "@logtape/logtape";
import type { Instance, Network } from "../../main.ts";
import { LogKeeper } from "../shared/log-keeper.ts";
import { type InstanceLog, isUnfinished } from "../shared/logs.ts";
import type { Accelerator } from "./accel.ts";
import { Compressor } from "./compress.ts";
import { Dhcp } from "./dhcp.ts";
import type { Images } from "./images.ts";
import { Limits } from "./limits.ts";
import { type Exit, type Owner, Records } from "./records.ts";
import { Slots } from "./slots.ts";
import { Vm } from "./vm.ts";

export interface FleetOptions {
  /** Milliseconds from the request to end to the end. */
  grace: number;
  /** Milliseconds for QEMU to answer after it was started. */
  start_timeout: number;
  /** Milliseconds for a guest to be ready after its QEMU was started; 0 for as long as it takes. */
  boot_timeout: number;
  /** The cgroup that holds those of all machines; empty for none. */
  cgroup_parent: string;
  max_concurrent_restores: number;
  /** Where memory is kept; with the other files of an instance where it is empty. */
  ram_dir: string;
  /** Bytes from which the log of a console is rotated. */
  log_max_size: number;
  log_files: number;
}
export interface FleetContext {
  readonly dataDir: string;
  readonly network: Network | undefined;
  readonly images: Images;
  readonly accelerator: Accelerator;
  readonly log: Logger;
  readonly options: FleetOptions;
  /** Whom QEMU runs as; null for this process's own user. */
  readonly owner: Owner | null;
  /** Why no machine can run here, or null. */
  readonly lacking: string | null;
  /** The first of these programs that this machine lacks. */
  missing(programs: readonly string[]): string | undefined;
  /** Aborts when this host is about to close. */
  readonly closing: AbortSignal;
  /** Told that an instance should be looked at. */
  changed(id: string, cause: string): void;
  /** Told that an instance has lost its memory, since it could not be restored. */
  lost(instance: Instance, reason: string): void;
}

/** Where the logs of a machine are: its console, what QEMU says of it, and what is to be its exit code. */
const LOGS = {
  app: (records: Records) => records.log,
  vmm: (records: Records) => records.qemuLog,
  exit: (records: Records) => records.path("exit"),
};
type LogName = keyof typeof LOGS;
const LOG_NAMES = Object.keys(LOGS) as LogName[];

/** The machines of both drivers on one data_dir, each with its turn: what is done with one is done one after the other. */
export class Fleet implements AsyncDisposable {
  readonly context: FleetContext;
  readonly restores: Slots;
  readonly #logs: LogKeeper;
  readonly compressor = new Compressor();
  readonly limits: Limits;
  readonly dhcp: Dhcp;
  readonly #folder: string;
  readonly #vms = new Map<string, Vm>();
  readonly #turns = new Map<string, Promise<unknown>>();
  /** What waits for a guest to be ready, and other work behind the scenes, by instance. */
  readonly #watches = new Map<string, AbortController>();
  readonly #busy = new Set<Promise<unknown>>();

  constructor(context: FleetContext) {
    this.context = context;
    const { dataDir, options, log, network, owner } = context;
    this.#folder = join(dataDir, "qemu", "instances");
    mkdirSync(this.#folder, { recursive: true });
    this.restores = new Slots(options.max_concurrent_restores);
    this.limits = new Limits({ parent: options.cgroup_parent, folder: this.#folder, log });
    this.dhcp = new Dhcp({ folder: join(dataDir, "qemu"), network, owner, log });
    this.#logs = new LogKeeper({ maxSize: options.log_max_size, files: options.log_files }, log);
  }

  vm(id: string): Vm {
    // Ids become names of files.
    if (!/^[\w-]+$/.test(id)) throw new TypeError(`Cannot use "${id}" as the id of an instance`);
    let vm = this.#vms.get(id);
    if (!vm) {
      const { log, owner, options, changed } = this.context;
      const records = new Records(join(this.#folder, id), options.ram_dir && join(options.ram_dir, id) || undefined);
      const ended = () => {
        // What sleeps has ended as well, and is being put away.
        if (!records.has("state")) this.unwatch(id);
        changed(id, "exit");
      };
      this.#vms.set(id, vm = new Vm({ records, log, owner, startTimeout: options.start_timeout, ended }));
    }
    return vm;
  }

  /** Does `work` after all that was to be done with the instance before. */
  async turn<T>(id: string, work: (vm: Vm) => Promise<T>): Promise<T> {
    const turn = (this.#turns.get(id) ?? Promise.resolve()).then(() => work(this.vm(id)));
    const settled = turn.catch(() => {}).then(() => {
      if (this.#turns.get(id) === settled) this.#turns.delete(id);
    });
    this.#turns.set(id, settled);
    return await turn;
  }

  isWatched(id: string): boolean {
    return this.#watches.has(id);
  }

  /** Work that goes on behind the scenes until it is done, {@linkcode unwatch} or the end of the host. */
  watch(id: string, work: (signal: AbortSignal) => Promise<unknown>): void {
    this.unwatch(id);
    const controller = new AbortController();
    this.#watches.set(id, controller);
    const running = work(controller.signal).catch((error) => {
      if (!controller.signal.aborted) this.context.log.warn("Watching {id} failed: {reason}", { id, reason: error });
    }).finally(() => {
      this.#busy.delete(running);
      if (this.#watches.get(id) === controller) this.#watches.delete(id);
    });
    this.#busy.add(running);
  }

  unwatch(id: string): void {
    this.#watches.get(id)?.abort(new Error("it is no longer waited for"));
    this.#watches.delete(id);
  }

  /** As {@linkcode unwatch}; resolves when nobody but a machine itself reads the memory any more. */
  async quiet(id: string): Promise<void> {
    this.unwatch(id);
    await this.compressor.ended(id);
  }

  /** A log of a machine; undefined where there is none of that source yet. */
  log(id: string, source: string): InstanceLog | undefined {
    const path = Object.hasOwn(LOGS, source) ? LOGS[source as LogName](this.vm(id).records) : undefined;
    return path !== undefined && existsSync(path) ? this.#log(id, source as LogName) : undefined;
  }

  /** Bounds what a guest can have written. */
  watchLogs(id: string): void {
    for (const name of LOG_NAMES) {
      this.#log(id, name);
      this.#logs.watch(`${id} ${name}`);
    }
  }

  /** Nobody writes any more. */
  unwatchLogs(id: string): void {
    for (const name of LOG_NAMES) this.#logs.unwatch(`${id} ${name}`);
  }

  /** Finishes what a host left that died while it rotated. */
  async recoverLogs(id: string): Promise<void> {
    const { folder } = this.vm(id).records;
    // One look for all of them: a host may have to adopt thousands.
    if (!existsSync(folder) || !readdirSync(folder).some(isUnfinished)) return;
    for (const name of LOG_NAMES) await this.#log(id, name).recover();
  }

  /** Lets go of what a machine had that has ended; how that was, which may be known by its cgroup alone. */
  async leave({ records }: Vm, id: string, { exit_code, exit_message }: Exit): Promise<Exit> {
    this.unwatchLogs(id);
    let exit = { exit_code, exit_message };
    if (exit_code === null && !records.ended() && this.limits.ranOut(id)) {
      records.end(exit = { exit_code, exit_message: "QEMU ended: its cgroup is out of memory" });
    }
    await this.limits.remove(id);
    return exit;
  }

  /** Ends the machine and removes all that is its own. */
  async erase(id: string): Promise<void> {
    this.unwatch(id);
    await this.turn(id, async (vm) => {
      await vm.end();
      await this.quiet(id);
      await this.limits.remove(id);
      const forget = () => Promise.all(LOG_NAMES.map((name) => this.#logs.forget(`${id} ${name}`)));
      await forget();
      await vm.records.erase();
      await forget(); // somebody may have read one meanwhile
      vm[Symbol.dispose]();
    });
    await this.dhcp.forget(id);
    this.#vms.delete(id);
  }

  /**
   * Removes what belongs to no instance of `live`; returns their ids. Only while no instance is being made. In `ram_dir`
   * nobody looks: other hosts and other things may have their files there, and ours go before the folder here does.
   */
  async sweep(live: ReadonlySet<string>): Promise<string[]> {
    const found = new Set([...readdirSync(this.#folder), ...this.limits.ids()]);
    const strays = [...found].filter((id) => !live.has(id) && /^[\w-]+$/.test(id));
    for (const id of strays) await this.erase(id);
    return strays;
  }

  /** Lets go of everything; what runs goes on running. */
  async [Symbol.asyncDispose](): Promise<void> {
    for (const id of [...this.#watches.keys()]) this.unwatch(id);
    for (const vm of this.#vms.values()) vm[Symbol.dispose]();
    await this.#logs[Symbol.asyncDispose]();
    await Promise.all(this.#busy);
    await this.dhcp[Symbol.asyncDispose]();
    this.limits[Symbol.dispose]();
  }

  /** One object for each, so that its readers and its rotation know of each other. */
  #log(id: string, name: LogName): InstanceLog {
    return this.#logs.of(`${id} ${name}`, LOGS[name](this.vm(id).records));
  }
}
