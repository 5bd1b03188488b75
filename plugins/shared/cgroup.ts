import {
  closeSync,
  constants,
  existsSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  rmdirSync,
  writeFileSync,
  writeSync,
} from "node:fs";
import { writeFile } from "node:fs/promises";
import { join } from "node:path";
import { delay } from "./async.ts";
import { signalProcess } from "./proc.ts";

/** How long the kernel may take to freeze or to empty a group; only a process stuck in the kernel needs longer. */
const PATIENCE_MS = 10_000;
/** Reclaimed in one call, so that a restore never waits for more than this. */
const RECLAIM_BYTES = 64 * 2 ** 20;

/** What the members of a group may use together; null or absent for no limit. */
export interface Limits {
  memory_bytes: number | null;
  /** Of CPUs, and parts of one. */
  cpus: number | null;
  /** Processes and threads. */
  tasks?: number;
}

/** One instance's control groups: its folder in the v2 hierarchy first, then those in v1 hierarchies, if any. */
export class Cgroup {
  readonly folders: readonly string[];
  readonly #main: string;

  constructor(folders: readonly string[]) {
    this.folders = folders;
    this.#main = folders[0];
  }

  /** Files to which a process writes `0` to become a member. */
  get joins(): string[] {
    return this.folders.map((folder) => join(folder, "cgroup.procs"));
  }

  /** Makes it, empty and with these limits; what cannot be limited here is returned. */
  make({ memory_bytes, cpus, tasks }: Limits): string[] {
    for (const folder of this.folders) mkdirSync(folder, { recursive: true });
    const lacking: string[] = [];
    if (memory_bytes !== null) {
      const done = this.#set({ "memory.max": memory_bytes, "memory.limit_in_bytes": memory_bytes });
      if (!done) lacking.push("memory");
    }
    if (cpus !== null) {
      const quota = Math.round(cpus * 100_000);
      const done = this.#set({ "cpu.max": `${quota} 100000`, "cpu.cfs_quota_us": quota });
      if (!done) lacking.push("cpu");
    }
    if (tasks !== undefined && !this.#set({ "pids.max": tasks })) lacking.push("pids");
    return lacking;
  }

  members(): number[] {
    return below(this.#main).flatMap((folder) =>
      (read(join(folder, "cgroup.procs")) ?? "").split("\n").filter(Boolean).map(Number)
    );
  }

  /** Whether all members stand still, or are about to. */
  isFrozen(): boolean {
    return read(join(this.#main, "cgroup.freeze"))?.trim() === "1";
  }

  /** Resolves once no member runs any more. An abort thaws them and rejects with the signal's reason. */
  async freeze(signal?: AbortSignal): Promise<void> {
    try {
      signal?.throwIfAborted();
      writeFileSync(join(this.#main, "cgroup.freeze"), "1");
      await this.#until("frozen", "1", signal);
    } catch (error) {
      await this.thaw();
      throw error;
    }
  }

  async thaw(): Promise<void> {
    write(join(this.#main, "cgroup.freeze"), "0");
  }

  /** SIGTERM to the members, while they are frozen: none can end meanwhile and leave its pid to a stranger. */
  async terminate(): Promise<void> {
    try {
      await this.freeze(AbortSignal.timeout(500));
    } catch (error) {
      if (!(error instanceof DOMException)) throw error;
    }
    for (const pid of this.members()) signalProcess(pid, "SIGTERM");
    await this.thaw();
  }

  /** Resolves once no member is left. */
  async kill(): Promise<void> {
    if (!existsSync(this.#main)) return;
    if (!write(join(this.#main, "cgroup.kill"), "1") && existsSync(this.#main)) await this.#killEach();
    await this.#until("populated", "0");
    await this.thaw();
  }

  /** {@linkcode Cgroup.kill}, and removes it; one that is not there is no error. */
  async remove(): Promise<void> {
    await this.kill();
    for (const folder of this.folders) {
      for (const each of below(folder).reverse()) await removeFolder(each);
    }
  }

  /** Gives memory back while it stays frozen. That there is nothing to give, or no swap to put it on, is no error. */
  async reclaim(signal: AbortSignal): Promise<void> {
    const forced = this.folders.map((folder) => join(folder, "memory.force_empty")).find((file) => existsSync(file));
    const file = join(this.#main, "memory.reclaim");
    try {
      if (!existsSync(file)) return forced === undefined ? undefined : await writeFile(forced, "0");
      for (let left = this.#current(); left > 0 && !signal.aborted; left -= RECLAIM_BYTES) {
        await writeFile(file, String(Math.min(left, RECLAIM_BYTES)));
      }
    } catch (error) {
      const { code } = error as NodeJS.ErrnoException;
      if (!["EAGAIN", "EBUSY", "EINTR", "EINVAL", "ENOENT", "ENODEV"].includes(code ?? "")) throw error;
    }
  }

  /** Of all that ever ran in it; undefined where the kernel does not count here. */
  cpuSeconds(): number | undefined {
    const usage = /^usage_usec (\d+)$/m.exec(read(join(this.#main, "cpu.stat")) ?? "");
    return usage ? Number(usage[1]) / 1e6 : undefined;
  }

  /** Whether the kernel killed a member for want of memory. */
  ranOutOfMemory(): boolean {
    const counts = ["memory.events", "memory.oom_control"];
    return this.folders.some((folder) =>
      counts.some((file) => /^oom_kill [1-9]/m.test(read(join(folder, file)) ?? ""))
    );
  }

  #current(): number {
    return Number(read(join(this.#main, "memory.current")) ?? 0);
  }

  /** Writes those of the files that are there; whether there was one. */
  #set(values: Record<string, string | number>): boolean {
    const files = this.folders.flatMap((folder) =>
      Object.entries(values).map(([name, value]) => ({ file: join(folder, name), value }))
    ).filter(({ file }) => existsSync(file));
    for (const { file, value } of files) writeFileSync(file, String(value));
    return files.length > 0;
  }

  // For kernels before 5.14. Frozen members cannot fork, so each round ends them all.
  async #killEach(): Promise<void> {
    await this.freeze();
    for (const pid of this.members()) signalProcess(pid, "SIGKILL");
  }

  // The kernel also reports this by inotify; at a few polls per change that would cost more than it saves.
  async #until(key: string, value: string, signal?: AbortSignal): Promise<void> {
    const end = Date.now() + PATIENCE_MS;
    for (let pause = 1;; pause = Math.min(pause * 2, 50)) {
      const events = read(join(this.#main, "cgroup.events"));
      if (events === undefined || events.includes(`${key} ${value}\n`)) return;
      signal?.throwIfAborted();
      if (Date.now() > end) {
        throw new Error(
          `Cannot bring ${this.#main} to "${key} ${value}": processes ${this.members().join(", ")} resist`,
        );
      }
      await delay(pause, signal && { signal });
    }
  }
}

/** The folder and all folders in it, parents first; none where it does not exist. */
function below(folder: string): string[] {
  try {
    const inner = readdirSync(folder, { withFileTypes: true }).filter((entry) => entry.isDirectory());
    return [folder, ...inner.flatMap((entry) => below(join(folder, entry.name)))];
  } catch (error) {
    if (isGone(error)) return [];
    throw error;
  }
}

async function removeFolder(folder: string): Promise<void> {
  const end = Date.now() + PATIENCE_MS;
  for (;;) {
    try {
      return rmdirSync(folder);
    } catch (error) {
      const { code } = error as NodeJS.ErrnoException;
      if (code === "ENOENT") return;
      // The last member is dead, but v1 lets go of it a moment later.
      if (code !== "EBUSY" || Date.now() > end) throw error;
      await delay(5);
    }
  }
}

function read(file: string): string | undefined {
  try {
    return readFileSync(file, "latin1");
  } catch (error) {
    if (isGone(error)) return undefined;
    throw error;
  }
}

/** False where there is no such file. */
function write(file: string, text: string): boolean {
  try {
    // Without O_CREAT, so that a missing file is ENOENT; without O_RDWR, which write-only files of cgroups refuse.
    const descriptor = openSync(file, constants.O_WRONLY);
    try {
      writeSync(descriptor, text);
    } finally {
      closeSync(descriptor);
    }
    return true;
  } catch (error) {
    if (isGone(error)) return false;
    throw error;
  }
}

function isGone(error: unknown): boolean {
  return ["ENOENT", "ENODEV"].includes((error as NodeJS.ErrnoException).code ?? "");
}
