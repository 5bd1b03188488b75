import { Buffer } from "node:buffer";
import { randomBytes } from "node:crypto";
import { chownSync, closeSync, existsSync, fdatasync, linkSync, mkdirSync, openSync, readdirSync } from "node:fs";
import { readFileSync, readSync, renameSync, rmSync, truncateSync, writeFileSync } from "node:fs";
import { rename, rm } from "node:fs/promises";
import { dirname, join } from "node:path";
import { promisify } from "node:util";
import { readIfThere, removeFolder } from "../shared/files.ts";
import { ownerOf } from "../shared/hierarchy.ts";
import { bootId, type ProcessId } from "../shared/proc.ts";
import type { Accel } from "./machine.ts";
import { Memory, syncFolder } from "./memory.ts";
import type { CompressionPlan } from "./snapshot-policy.ts";

const dataSynced = promisify(fdatasync);
const MARKS = ["ready", "paused", "foreign", "stale"] as const;
/** What tells of one run, and of nothing after it. */
const OF_A_RUN = [...MARKS, "state", "state.spent", "state.tmp", "snapshot.json", "ended.json"];

/** A start of QEMU, as it is kept before it happens. */
export interface Launch {
  /** Of this start; its files have it in their names. */
  readonly generation: string;
  /** The start of the machine that it belongs to. */
  readonly boot: string;
  /** What QEMU is started with, but for `memory` and what a restore adds: that one starts it with the same. */
  readonly args: readonly string[];
  /** Not shared: a private view of the memory that it was forked from. */
  readonly memory: { readonly bytes: number; readonly shared: boolean };
  readonly accel: Accel;
  /** The folder of the image. */
  readonly image: string;
  /** The host's end of its network; null where it has none. */
  readonly device: string | null;
  /** Files of the cgroups that it is in; absent where it is in none. */
  readonly joins?: readonly string[];
}

/** A device state that was written whole, and what it needs to be of use. */
export interface Snapshot {
  readonly id: string;
  /** When it was made, in milliseconds since the epoch. */
  readonly at: number;
  readonly boot: string;
  /** Whether the memory is on disk too, so that it outlives this start of the machine. */
  readonly durable: boolean;
  /** Whether the memory is in the state, and not in a file of its own. */
  readonly full: boolean;
  /** Whether the memory is its compressed copy, whatever is in the file of the memory itself. */
  readonly compressed: boolean;
  /** Whether it is to be, how and when. */
  readonly plan: CompressionPlan | null;
}

/** How a machine ended. */
export interface Exit {
  exit_code: number | null;
  exit_message: string | null;
}

/** It was ready; it was paused by us; it is a copy that was not told yet who it is; it was not told yet what time it is. */
export type Mark = typeof MARKS[number];

export interface Owner {
  readonly uid: number;
  readonly gid: number;
}

/**
 * The files of one instance. The folder is the host's: QEMU, which is not trusted, may write to those files in it that are
 * its own, and to the folder `run` of its sockets, but put no other in a file's place.
 */
export class Records extends Memory {
  readonly folder: string;
  /** `ramFolder` where the memory is kept elsewhere. */
  constructor(folder: string, ramFolder: string = folder) {
    super(ramFolder, folder);
    this.folder = folder;
  }

  path(name: string): string {
    return join(this.folder, name);
  }

  get log(): string {
    return this.path("serial.log");
  }

  get qemuLog(): string {
    return this.path("qemu.log");
  }

  has(name: "state" | "paused"): boolean {
    return existsSync(this.path(name));
  }

  /** The folder with what is QEMU's own, given to `owner` where it runs as somebody else. */
  make(owner: Owner | null): void {
    mkdirSync(this.folder, { recursive: true, mode: 0o711 });
    mkdirSync(dirname(this.ram), { recursive: true, mode: 0o711 });
    this.claim();
    mkdirSync(this.path("run"), { recursive: true, mode: 0o700 });
    for (const file of [this.log, this.qemuLog, this.path("exit"), this.ram]) {
      if (!existsSync(file)) writeFileSync(file, "", { mode: 0o600 });
    }
    if (!owner) return;
    const overlay = existsSync(this.path("overlay.qcow2")) ? [this.path("overlay.qcow2")] : [];
    for (const file of [this.path("run"), this.log, this.path("exit"), this.ram, ...overlay]) {
      chownSync(file, owner.uid, owner.gid);
    }
  }

  /** Nothing that tells of the run before. */
  clear(): void {
    for (const name of OF_A_RUN) rmSync(this.path(name), { force: true });
    this.leaveBase();
    this.tidy();
    truncateSync(this.path("exit"), 0);
  }

  /** Frees the disk that the memory takes; forks keep it for themselves. */
  free(owner: Owner | null): void {
    this.leaveBase();
    this.tidy();
    this.empty(owner);
  }

  /** Removes what is left of compressing the memory, or of the way back. Not while either is under way. */
  tidy(): void {
    this.removeMade({ keep: this.snapshot()?.compressed === true });
  }

  /** @throws where it is there and cannot be understood */
  launch(): Launch | undefined {
    const launch = this.#read<Launch>("launch.json");
    if (launch && (typeof launch.generation !== "string" || !Array.isArray(launch.args))) {
      throw new Error(`"${this.path("launch.json")}" is not a record of a launch`);
    }
    return launch;
  }

  /** Nothing where it cannot be understood, for nothing can be found by it. */
  readableLaunch(): Launch | undefined {
    try {
      return this.launch();
    } catch {
      return undefined;
    }
  }

  /** Keeps a launch, before it happens. */
  async begin(wanted: Omit<Launch, "generation" | "boot">): Promise<Launch> {
    const launch = { ...wanted, generation: randomBytes(8).toString("hex"), boot: bootId() };
    for (const name of readdirSync(this.folder).filter((each) => /^(?:pid\.|ended\.json$)/.test(each))) {
      rmSync(this.path(name), { force: true });
    }
    await this.#replace("launch.json", launch);
    return launch;
  }

  /** Where the process of a launch is kept, by whom it waits for. */
  pidFile({ generation }: Launch): string {
    return this.path(`pid.${generation}`);
  }

  /** The process of a launch, in this start of the machine. */
  processOf(launch: Launch): ProcessId | undefined {
    const text = launch.boot === bootId() ? readIfThere(this.pidFile(launch)) ?? "" : "";
    const [, pid, started, owner] = /^(\d+) (\d+)(?: (\w+))?\n$/.exec(text) ?? [];
    // Not written whole, it was never let go. In a copy of a folder, it is what runs for the first.
    if (started === undefined || (owner !== undefined && owner !== ownerOf(this.folder))) return undefined;
    return { pid: Number(pid), started: Number(started) };
  }

  mark(name: Mark): void {
    writeFileSync(this.path(name), "");
  }

  unmark(name: Mark): void {
    rmSync(this.path(name), { force: true });
  }

  isMarked(name: Mark): boolean {
    return existsSync(this.path(name));
  }

  /** Nothing where it was not written whole: how it ended is no reason to know nothing of it. */
  ended(): Exit | undefined {
    try {
      return this.#read<Exit>("ended.json");
    } catch {
      return undefined;
    }
  }

  /** Synchronous, so that it is written before anybody can see that the machine is gone. */
  end(exit: Exit): void {
    writeFileSync(this.path("ended.json"), JSON.stringify(exit));
  }

  /** What the guest has written before it powered off. No more of it is read: it may write as much as it likes. */
  exitCode(): number | null {
    if (!existsSync(this.path("exit"))) return null;
    const head = Buffer.alloc("255\n".length);
    const file = openSync(this.path("exit"), "r");
    try {
      readSync(file, head);
    } finally {
      closeSync(file);
    }
    const [, digits] = /^(\d{1,3})\n/.exec(head.toString("latin1")) ?? [];
    return digits === undefined ? null : Number(digits);
  }

  /** The complete snapshot, if there is one. */
  snapshot(): Snapshot | undefined {
    return existsSync(this.path("state")) ? this.#read<Snapshot>("snapshot.json") : undefined;
  }

  /** Makes what is in `state.tmp`, and on disk, the snapshot. */
  async complete({ full, plan }: Pick<Snapshot, "full" | "plan">): Promise<void> {
    const [id, at] = [randomBytes(8).toString("hex"), Date.now()];
    const snapshot: Snapshot = { id, at, boot: bootId(), durable: full, full, compressed: false, plan };
    await this.#persist("snapshot.json", snapshot);
    await rename(this.path("state.tmp"), this.path("state"));
    await syncFolder(this.folder);
  }

  /** Makes this the sleeping copy of another; its own memory it has when it is restored. */
  async inherit(source: Records, launch: Omit<Launch, "generation" | "boot">): Promise<void> {
    const snapshot = source.snapshot()!;
    if (!snapshot.full) linkSync(existsSync(source.base) ? source.base : source.ram, this.base);
    this.mark("foreign");
    await this.begin(launch);
    await this.#persist("snapshot.json", snapshot);
    linkSync(source.path("state"), this.path("state")); // which nobody ever changes
    for (const folder of new Set([dirname(this.ram), this.folder])) await syncFolder(folder);
  }

  /** Notes what became of the memory, or is to, unless the snapshot has been spent meanwhile. */
  async amend(change: Partial<Pick<Snapshot, "durable" | "compressed" | "plan">>): Promise<void> {
    const snapshot = this.snapshot();
    if (snapshot) await this.#persist("snapshot.json", { ...snapshot, ...change } satisfies Snapshot);
  }

  /**
   * From here on nobody restores it: memory that ran on must never meet the device state of before. Then `next` is done,
   * while what is left of it is removed.
   */
  async spend(next: () => Promise<unknown> = () => Promise.resolve()): Promise<void> {
    // After a loss of power nobody restores one whose memory was not on disk either, whatever became of its name.
    const refused = this.snapshot()?.durable === false;
    if (existsSync(this.path("state"))) renameSync(this.path("state"), this.path("state.spent"));
    const synced = syncFolder(this.folder);
    if (!refused) await synced;
    await Promise.all([next(), synced]);
    await rm(this.path("state.spent"), { force: true });
    this.tidy();
  }

  async erase(): Promise<void> {
    const folders = new Set([...this.isAnothers() ? [] : [dirname(this.ram)], this.folder]);
    for (const folder of folders) await removeFolder(folder);
  }

  #read<T>(name: string): T | undefined {
    if (!existsSync(this.path(name))) return undefined;
    try {
      return JSON.parse(readFileSync(this.path(name), "utf8"));
    } catch (error) {
      throw new Error(`Cannot read "${this.path(name)}"`, { cause: error });
    }
  }

  async #persist(name: string, value: unknown): Promise<void> {
    await this.#replace(name, value);
    await syncFolder(this.folder);
  }

  /** After a loss of power it is either of both. */
  async #replace(name: string, value: unknown): Promise<void> {
    const unfinished = this.path(`${name}.tmp`);
    const file = openSync(unfinished, "w", 0o600);
    try {
      writeFileSync(file, JSON.stringify(value));
      await dataSynced(file);
    } finally {
      closeSync(file);
    }
    renameSync(unfinished, this.path(name));
  }
}
