/**
 * The memory of a machine that sleeps, compressed by the program `zstd`, which knows lz4 too. It runs beside this host and
 * ends with it. At each moment the memory is whole in one of two files, and the snapshot says in which.
 */
import { randomBytes } from "node:crypto";
import { chownSync, existsSync, rmSync, statSync } from "node:fs";
import { rename } from "node:fs/promises";
import { dirname } from "node:path";
import { messageOf } from "../shared/errors.ts";
import { CommandError, run } from "../shared/run.ts";
import { syncData, syncFolder } from "./memory.ts";
import type { Owner, Records } from "./records.ts";
import { Slots } from "./slots.ts";
import { Unrestorable } from "./snapshot.ts";

export interface Compression {
  readonly algorithm: "zstd" | "lz4";
  readonly level: number;
}

/** The shell opens the files, so that no byte of them comes through this process. */
const BETWEEN_FILES = `
from=$1 to=$2
shift 2
umask 077
exec <"$from" >"$to" || exit 126
exec "$@"
`;
/** It dies with the host, which would know nothing of it. */
const BOUND = ["setpriv", "--pdeathsig", "KILL", "--"];
/** What is said of a file that will be no better the next time, and not of a disk that is full. */
const DAMAGED = /premature end|unexpected end|unfinished|unknown header|unsupported format|Decoding error/;
/** After everybody else who wants the processor or the disk; not only when nobody does, for it could not even end then. */
const LOWLY = ["nice", "-n", "19", "ionice", "-c", "2", "-n", "7"];

/** Why an algorithm cannot be used on this machine, or null; `env` is added to this process's own. */
export async function lacksCompression(
  algorithm: Compression["algorithm"],
  env: Record<string, string> = {},
): Promise<string | null> {
  try {
    await run(BOUND[0], [...BOUND.slice(1), ...LOWLY, ...zstd({ algorithm, level: 1 })], { env });
    return null;
  } catch (error) {
    if (!(error instanceof CommandError)) throw error;
    return error.stderr.trim().split("\n")[0] || `program "${error.command.split(" ")[0]}" is not in PATH`;
  }
}

/** Compresses memory, one machine's at a time: nobody waits for it, and everybody else needs the processor too. */
export class Compressor {
  readonly #slots = new Slots(1);
  readonly #readers = new Map<string, Promise<void>>();

  /**
   * Writes a compressed copy of an instance's memory, which nobody may change meanwhile.
   *
   * @returns the copy's file, complete and on disk
   * @throws the signal's reason; then the copy is gone, and nobody reads the memory once {@linkcode ended} resolves
   */
  async copy(id: string, { ram, compressed }: Records, compression: Compression, signal: AbortSignal): Promise<string> {
    using _slot = await this.#slots.take(signal);
    const copy = unfinished(compressed);
    const reading = pipe(ram, copy, [...LOWLY, ...zstd(compression)], signal);
    const reader = reading.catch(() => {});
    this.#readers.set(id, reader);
    try {
      await reading;
      await syncData(copy);
      return copy;
    } catch (error) {
      rmSync(copy, { force: true });
      throw error;
    } finally {
      if (this.#readers.get(id) === reader) this.#readers.delete(id);
    }
  }

  /** Resolves when nobody reads the memory of an instance any more, soon after the abort of who does. */
  async ended(id: string): Promise<void> {
    await this.#readers.get(id);
  }
}

/** Puts the copy of {@linkcode Compressor.copy} in the place of the memory. */
export async function keepCompressed(records: Records, copy: string, owner: Owner | null): Promise<void> {
  await rename(copy, records.compressed);
  await syncFolder(dirname(records.compressed));
  await records.amend({ compressed: true });
  records.empty(owner);
}

export interface ExpandOptions {
  /** How many it must have. */
  readonly bytes: number;
  readonly owner: Owner | null;
  readonly signal: AbortSignal;
}

/**
 * Writes the memory out again, with holes where it is zero. The compressed copy is still what the snapshot is made of.
 *
 * @throws {Unrestorable} where it is broken for good; {Error} where it may work another time; the signal's reason
 */
export async function expand(records: Records, { bytes, owner, signal }: ExpandOptions): Promise<void> {
  const whole = unfinished(`${records.ram}.raw`);
  try {
    await pipe(records.compressed, whole, ["zstd", "-q", "-d", "--sparse", "-c"], signal);
    const { size } = statSync(whole);
    if (size !== bytes) throw new Unrestorable(`it has ${size} bytes in the place of ${bytes}`);
    if (owner) chownSync(whole, owner.uid, owner.gid);
    await rename(whole, records.ram);
  } catch (error) {
    rmSync(whole, { force: true });
    signal.throwIfAborted();
    const gone = !existsSync(records.compressed);
    const broken = gone || error instanceof Unrestorable || DAMAGED.test(messageOf(error));
    throw new (broken ? Unrestorable : Error)(`its memory cannot be decompressed: ${messageOf(error)}`, {
      cause: error,
    });
  }
}

/** Has the snapshot made of the memory itself again. @throws as {@linkcode expand} */
export async function keepExpanded(records: Records, options: ExpandOptions): Promise<void> {
  await expand(records, options);
  await syncData(records.ram);
  await syncFolder(dirname(records.ram));
  await records.amend({ compressed: false });
  records.tidy();
}

/** Resolves when the program is gone, whatever became of it. */
async function pipe(from: string, to: string, command: string[], signal: AbortSignal): Promise<void> {
  signal.throwIfAborted();
  const args = ["-c", BETWEEN_FILES, "dormouse-zstd", from, to, ...BOUND, ...command];
  try {
    await run("/bin/sh", args, { signal, timeout: 0 });
  } catch (error) {
    signal.throwIfAborted();
    throw error instanceof CommandError && error.stderr ? new Error(error.stderr.trim(), { cause: error }) : error;
  }
}

function zstd({ algorithm, level }: Compression): string[] {
  return ["zstd", "-q", "-T1", "--check", `--format=${algorithm}`, `-${level}`, "-c"];
}

/** Another name each time, so that nobody meets what an earlier host has left, or is still about to leave. */
function unfinished(path: string): string {
  return `${path}.${randomBytes(6).toString("hex")}`;
}
