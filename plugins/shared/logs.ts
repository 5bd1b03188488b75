import { Buffer } from "node:buffer";
import { type FileHandle, open, readdir, rename, rm, stat, statfs, truncate } from "node:fs/promises";
import { basename, dirname, join } from "node:path";
import { delay } from "./async.ts";
import { CommandError, run } from "./run.ts";
import { Lines } from "./lines.ts";

const NEWLINE = 10;
const CHUNK_BYTES = 64 * 1024;
const COPY_BYTES = 2 ** 20;
/** A longer line is split: the reader's memory is bounded, and an SSE event too. */
const MAX_LINE_BYTES = 2 ** 20;
/** How often a follower looks for more. An inotify watch would wake it for every single write. */
const FOLLOW_MS = 100;

export interface LogOptions {
  /** Bytes from which the file is rotated. */
  maxSize: number;
  /** Rotated files that are kept: that with `.1` behind its name is the newest. */
  files: number;
}

interface Chunk {
  bytes: Buffer;
  position: number;
  /** The log was removed, with its instance. */
  gone?: boolean;
}

/** Whether it is the name of a file that a rotation is in the middle of, of any log. */
export function isUnfinished(name: string): boolean {
  return /\.next-\d+(?:\.new)?$/.test(name);
}

/**
 * The output of one instance, which writes to its log file by itself and never reopens it. Rotation copies the head of the
 * file away and cuts it off. Positions count from the beginning of that file when this object was made, and go on
 * counting over rotations, so that a reader knows where it is; rotated files lie below.
 */
export class InstanceLog {
  readonly #file: string;
  readonly #options: LogOptions;
  /** The position of the first byte of the file. */
  #base = 0;
  #turn: Promise<unknown> = Promise.resolve();

  constructor(file: string, options: LogOptions) {
    this.#file = file;
    this.#options = options;
  }

  /** Finishes or undoes what a host left that died while it rotated. */
  recover(): Promise<void> {
    return this.#alone(async () => {
      const folder = dirname(this.#file);
      const prefix = `${basename(this.#file)}.next-`;
      for (const name of await readdir(folder).catch(ignoreMissing) ?? []) {
        const match = name.startsWith(prefix) && /^(\d+)(\.new)?$/.exec(name.slice(prefix.length));
        if (!match) continue;
        const copy = join(folder, name);
        // The copy is complete, but was its original cut off? Where it still stands there, nothing has happened yet.
        if (match[2] || await this.#stillThere(copy, Number(match[1]))) await rm(copy, { force: true });
        else await this.#publish(copy);
      }
    });
  }

  /** Resolves when nothing is done to its files. */
  idle(): Promise<void> {
    return this.#alone(() => Promise.resolve());
  }

  /** Rotates until the file is within its size. */
  rotate(): Promise<void> {
    return this.#alone(async () => {
      const { maxSize } = this.#options;
      for (let size = await sizeOf(this.#file); size !== undefined && size > maxSize; size = await sizeOf(this.#file)) {
        const { bsize } = await statfs(this.#file);
        // Whole blocks, and never all of the file: that is what the kernel can collapse.
        const whole = (bytes: number) => Math.floor(Math.min(bytes, size - 1) / bsize) * bsize;
        const beyond = whole(size - this.#options.files * maxSize - maxSize);
        const cut = beyond > 0 ? await this.#drop(beyond) : whole(maxSize) > 0 && await this.#cutHead(whole(maxSize));
        if (!cut) await this.#cutAll();
      }
    });
  }

  /** The last `tail` lines over all files, and with `follow` what comes after, until `signal` aborts. */
  async *lines(
    { tail, follow, signal }: { tail: number; follow: boolean; signal: AbortSignal },
  ): AsyncGenerator<string> {
    const end = await this.#end();
    let position = await this.#tailStart(tail, end);
    const lines = new Lines(MAX_LINE_BYTES);
    while (!signal.aborted && (follow || position < end)) {
      const chunk = await this.#read(position, follow ? CHUNK_BYTES : Math.min(CHUNK_BYTES, end - position));
      if (chunk.position > position) {
        yield* lines.end();
        yield `[dormouse: ${chunk.position - position} bytes were rotated away before they could be read]`;
      }
      position = chunk.position + chunk.bytes.length;
      if (chunk.bytes.length > 0) yield* lines.push(chunk.bytes);
      else if (!follow || chunk.gone) break;
      else await delay(FOLLOW_MS, { signal }).catch(() => undefined); // it rejects only where the signal aborts
    }
    if (!signal.aborted) yield* lines.end();
  }

  /** Where the last `tail` lines before `end` begin. */
  async #tailStart(tail: number, end: number): Promise<number> {
    if (tail <= 0) return end;
    let newlines = 0;
    for (let from = end;;) {
      const { bytes, position } = await this.#readBefore(from, CHUNK_BYTES);
      if (bytes.length === 0) return from;
      for (let at = bytes.length - 1; at >= 0; at--) {
        // The newline at the very end closes the last line, it does not begin another.
        if (bytes[at] !== NEWLINE || position + at === end - 1) continue;
        if (++newlines === tail) return position + at + 1;
      }
      from = position;
    }
  }

  #end(): Promise<number> {
    return this.#alone(async () => this.#base + (await sizeOf(this.#file) ?? 0));
  }

  /** At most `length` bytes that end at `end`, of one file; none where there is nothing older. */
  #readBefore(end: number, length: number): Promise<Chunk> {
    return this.#alone(async () => {
      const segment = (await this.#segments()).find(({ start }) => start < end);
      if (!segment) return { bytes: Buffer.alloc(0), position: end };
      const position = Math.max(segment.start, end - length);
      return { bytes: await readAt(segment.file, position - segment.start, end - position), position };
    });
  }

  #read(position: number, length: number): Promise<Chunk> {
    return this.#alone(async () => {
      const segments = await this.#segments();
      const oldest = segments.at(-1)!.start;
      const newest = segments[0];
      if (await sizeOf(this.#file) === undefined) return { bytes: Buffer.alloc(0), position, gone: true };
      // Emptied by somebody else: what it holds now is all new.
      if (position > newest.end) return { bytes: await readAt(newest.file, 0, length), position: newest.start };
      const at = Math.max(position, oldest);
      const segment = segments.find(({ start }) => at >= start)!;
      const most = segment === newest ? length : Math.min(length, segment.end - at);
      return { bytes: await readAt(segment.file, at - segment.start, most), position: at };
    });
  }

  /** The newest first; the file that is written to is always there, if only with nothing in it. */
  async #segments(): Promise<{ file: string; start: number; end: number }[]> {
    const segments = [{ file: this.#file, start: this.#base, end: this.#base + (await sizeOf(this.#file) ?? 0) }];
    let end = this.#base;
    for (let index = 1; index <= this.#options.files; index++) {
      const file = `${this.#file}.${index}`;
      const size = await sizeOf(file);
      if (size === undefined) break;
      segments.push({ file, start: end - size, end });
      end -= size;
    }
    return segments;
  }

  /** Moves the head to a file of its own; false where the file system cannot cut it off. */
  async #cutHead(head: number): Promise<boolean> {
    const { copy } = await this.#copy(head);
    if (!await this.#collapse(head)) {
      await rm(copy, { force: true });
      return false;
    }
    await this.#publish(copy);
    return true;
  }

  /** Forgets the head, which nobody would keep, and with it all that is older. */
  async #drop(head: number): Promise<boolean> {
    for (let index = this.#options.files; index > 0; index--) await rm(`${this.#file}.${index}`, { force: true });
    return await this.#collapse(head);
  }

  async #collapse(head: number): Promise<boolean> {
    try {
      await run("fallocate", ["--collapse-range", "--offset", "0", "--length", String(head), this.#file]);
    } catch (error) {
      if (error instanceof CommandError) return false;
      throw error;
    }
    this.#base += head;
    return true;
  }

  // What is written between the end of the copy and the cut is lost: such a file system leaves no better way.
  async #cutAll(): Promise<void> {
    const { copy, end } = await this.#copy(Infinity);
    await truncate(this.#file);
    this.#base += end;
    await this.#publish(copy);
  }

  /** Copies what is before `end`, or before the end of the file, as far as it is kept; its name says where it ended. */
  async #copy(end: number): Promise<{ copy: string; end: number }> {
    const unfinished = `${this.#file}.next-0.new`;
    const size = await sizeOf(this.#file) ?? 0;
    let at = Math.max(0, Math.min(end, size) - this.#options.maxSize);
    const source = await open(this.#file, "r");
    try {
      const target = await open(unfinished, "w");
      try {
        while (at < end) {
          const bytes = await readChunk(source, at, Math.min(COPY_BYTES, end - at));
          if (bytes.length === 0) break;
          await target.write(bytes);
          at += bytes.length;
        }
      } finally {
        await target.close();
      }
    } finally {
      await source.close();
    }
    const copy = `${this.#file}.next-${at}`;
    await rename(unfinished, copy);
    return { copy, end: at };
  }

  async #stillThere(copy: string, head: number): Promise<boolean> {
    const size = await sizeOf(copy) ?? 0;
    for (let at = 0; at < size; at += CHUNK_BYTES) {
      const copied = await readAt(copy, at, CHUNK_BYTES);
      const original = await readAt(this.#file, head - size + at, copied.length);
      if (!copied.equals(original)) return false;
    }
    return true;
  }

  /** Makes the copy the newest of the rotated files, after moving the others up as far as the first gap, which a death half-way leaves. */
  async #publish(copy: string): Promise<void> {
    const { files } = this.#options;
    if (files === 0) return await rm(copy, { force: true });
    let gap = 1;
    while (gap < files && await sizeOf(`${this.#file}.${gap}`) !== undefined) gap++;
    for (let index = gap; index > 1; index--) await rename(`${this.#file}.${index - 1}`, `${this.#file}.${index}`);
    await rename(copy, `${this.#file}.1`);
  }

  /** Readers and rotation take turns, so that a position means the same to both. */
  #alone<T>(work: () => Promise<T>): Promise<T> {
    const turn = this.#turn.then(work);
    this.#turn = turn.catch(() => undefined);
    return turn;
  }
}

async function readAt(file: string, position: number, length: number): Promise<Buffer> {
  const handle = await open(file, "r").catch(ignoreMissing);
  if (!handle) return Buffer.alloc(0);
  try {
    return await readChunk(handle, position, length);
  } finally {
    await handle.close();
  }
}

async function readChunk(handle: FileHandle, position: number, length: number): Promise<Buffer> {
  const buffer = Buffer.alloc(length);
  const { bytesRead } = await handle.read(buffer, 0, length, position);
  return buffer.subarray(0, bytesRead);
}

async function sizeOf(file: string): Promise<number | undefined> {
  return (await stat(file).catch(ignoreMissing))?.size;
}

function ignoreMissing(error: NodeJS.ErrnoException): undefined {
  if (error.code !== "ENOENT") throw error;
}
