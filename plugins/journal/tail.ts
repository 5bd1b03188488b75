import type { Frames, Reader } from "./reader.ts";

const KEPT = 512;
const KEPT_BYTES = 4 * 1024 * 1024;

/**
 * The last rows, as clients get them, in memory: those who are up to date share one look at the table per commit,
 * however many they are. Who is behind looks for himself.
 */
export class Tail {
  readonly #reader: Reader;
  readonly #last: () => number;
  #frames: Frames["frames"] = [];
  /** The frames are all rows above `from`, up to `to`. */
  #from: number;
  #to: number;

  /** `last` is the number of the last row. */
  constructor(reader: Reader, last: () => number) {
    this.#reader = reader;
    this.#last = last;
    this.#from = this.#to = last();
  }

  /** The rows above a number. Where they are looked up, only those of the instance; the others are all shared. */
  after(seq: number, instance?: string): Frames {
    this.#load();
    if (seq < this.#from) return this.#reader.window(seq, instance);
    // From the end: who is up to date has few to get.
    let begin = this.#frames.length;
    while (begin > 0 && this.#frames[begin - 1].seq > seq) begin--;
    return { frames: this.#frames.slice(begin), to: this.#to };
  }

  #load(): void {
    const last = this.#last();
    // Nobody has looked for long, or the end has moved by more than is kept.
    if (last - this.#to > KEPT) [this.#frames, this.#from, this.#to] = [[], last - KEPT, last - KEPT];
    while (this.#to < last) {
      const { frames, to } = this.#reader.window(this.#to);
      this.#to = to;
      this.#keep([...this.#frames, ...frames]);
    }
  }

  #keep(frames: Frames["frames"]): void {
    let begin = frames.length;
    for (let bytes = 0; begin > 0 && frames.length - begin < KEPT && bytes < KEPT_BYTES; begin--) {
      bytes += frames[begin - 1].message.data.length;
    }
    if (begin > 0) this.#from = frames[begin - 1].seq;
    this.#frames = begin > 0 ? frames.slice(begin) : frames;
  }
}
