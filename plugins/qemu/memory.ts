import { chownSync, existsSync, readdirSync, rmSync, statSync, truncateSync, writeFileSync } from "node:fs";
import { open, rename, rm } from "node:fs/promises";
import { basename, dirname, join } from "node:path";
import { readIfThere } from "../shared/files.ts";
import { ownerOf } from "../shared/hierarchy.ts";
import { bootId } from "../shared/proc.ts";
import { run } from "../shared/run.ts";
import type { Owner } from "./records.ts";

/** Milliseconds in which a memory is copied. */
const COPY_MS = 300_000;
/** What is made of a memory: itself compressed, and what either way is not complete yet. */
const MADE_OF_RAM = /^ram\.(?:tmp|zst|zst\.[0-9a-f]+|raw\.[0-9a-f]+)$/;

/** The files of one machine's memory. */
export class Memory {
  /** The memory. Forks of a sleeping machine have it too, by another name: with more than one it must not change. */
  readonly ram: string;
  /** The memory that this one was forked from, until it has its own. */
  readonly base: string;
  /** The memory of a machine that sleeps, by whichever algorithm; of use only where the snapshot says so. */
  readonly compressed: string;

  /** The folder of the machine that it belongs to, and in its own, where that is elsewhere, which machine that is. */
  readonly #home: string;
  readonly #mark: string | undefined;

  constructor(folder: string, home: string) {
    this.#home = home;
    this.#mark = folder === home ? undefined : join(folder, "owner");
    this.ram = join(folder, "ram");
    this.base = join(folder, "ram.base");
    this.compressed = join(folder, "ram.zst");
  }

  /**
   * Whether it is that of a machine of another data_dir, which this one may be a copy of. They share no more than the name
   * and a folder beyond both; after a start of the computer it belongs to who uses it first.
   */
  isAnothers(): boolean {
    const [owner, boot] = (this.#mark && readIfThere(this.#mark))?.trim().split(" ") ?? [];
    return boot === bootId() && existsSync(this.#home) && owner !== ownerOf(this.#home);
  }

  /** Makes it this machine's. @throws where it is another's */
  claim(): void {
    if (this.isAnothers()) throw new Error(`"${dirname(this.ram)}" has the memory of a machine of another data_dir`);
    if (this.#mark) writeFileSync(this.#mark, `${ownerOf(this.#home)} ${bootId()}\n`);
  }

  /** Memory of zeros, in a file that nobody else has. */
  blank(bytes: number, owner: Owner | null): void {
    rmSync(this.ram, { force: true });
    writeFileSync(this.ram, "", { mode: 0o600 });
    truncateSync(this.ram, bytes);
    if (owner) chownSync(this.ram, owner.uid, owner.gid);
  }

  /** Frees what the file of the memory takes. */
  empty(owner: Owner | null): void {
    if ((statSync(this.ram, { throwIfNoEntry: false })?.size ?? 0) > 0) this.blank(0, owner);
  }

  /** Once it has all that it needs of the memory that it was forked from. */
  leaveBase(): void {
    rmSync(this.base, { force: true });
  }

  /** Whether it is a view of another's memory. */
  isForked(): boolean {
    return existsSync(this.base);
  }

  /** Whether all of it is there: a folder of files may itself be memory, and be empty after a start of the machine. */
  isWhole(bytes: number): boolean {
    const file = this.isForked() ? this.base : this.ram;
    return statSync(file, { throwIfNoEntry: false })?.size === bytes;
  }

  /** Whether forks have the memory too. */
  isShared(): boolean {
    return (statSync(this.ram, { throwIfNoEntry: false })?.nlink ?? 0) > 1;
  }

  /** Gives it a memory that nobody else has a view of, before it changes; `durable` as it is until then. */
  async separate(owner: Owner | null, { durable, signal }: { durable: boolean; signal: AbortSignal }): Promise<void> {
    if (!this.isShared()) return;
    const copy = `${this.ram}.tmp`;
    await rm(copy, { force: true });
    await run("cp", ["--reflink=auto", "--sparse=always", this.ram, copy], { timeout: COPY_MS, signal });
    if (owner) chownSync(copy, owner.uid, owner.gid);
    // What was on disk still is where it does not wake after all.
    if (durable) await syncData(copy);
    await rename(copy, this.ram);
    await syncFolder(dirname(this.ram));
  }

  /** Removes what was made of the memory and not completed, and its compressed copy unless that is the memory now. */
  removeMade({ keep }: { keep: boolean }): void {
    const folder = dirname(this.ram);
    const kept = keep ? basename(this.compressed) : undefined;
    for (const name of existsSync(folder) && !this.isAnothers() ? readdirSync(folder) : []) {
      if (MADE_OF_RAM.test(name) && name !== kept) rmSync(join(folder, name), { force: true });
    }
  }
}

/** Resolves when what is in a file is on disk. */
export async function syncData(path: string): Promise<void> {
  await using file = await open(path, "r+");
  await file.datasync();
}

/** Resolves when the names in a folder are on disk. */
export async function syncFolder(path: string): Promise<void> {
  await using folder = await open(path, "r");
  await folder.sync();
}
