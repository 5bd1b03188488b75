import { Buffer } from "node:buffer";

const NEWLINE = 10;

/**
 * Cuts bytes into lines as they come. A line beyond `max` bytes is handed out in pieces of at most that size, none of
 * which ends inside a character. What is not UTF-8 becomes U+FFFD.
 */
export class Lines {
  readonly #max: number;
  #rest: Buffer = Buffer.alloc(0);

  constructor(max: number) {
    this.#max = max;
  }

  *push(bytes: Buffer): Generator<string> {
    const all = this.#rest.length === 0 ? bytes : Buffer.concat([this.#rest, bytes]);
    let from = 0;
    // What was kept is known to hold no newline.
    let end = all.indexOf(NEWLINE, this.#rest.length);
    for (; end >= 0; end = all.indexOf(NEWLINE, from)) {
      yield* this.#pieces(all, from, end);
      from = end + 1;
    }
    while (all.length - from > this.#max) {
      const cut = this.#cut(all, from);
      yield all.toString("utf8", from, cut);
      from = cut;
    }
    this.#rest = all.subarray(from);
  }

  /** The last line, where it has no newline. */
  *end(): Generator<string> {
    const rest = this.#rest;
    this.#rest = Buffer.alloc(0);
    if (rest.length > 0) yield* this.#pieces(rest, 0, rest.length);
  }

  *#pieces(bytes: Buffer, from: number, end: number): Generator<string> {
    while (end - from > this.#max) {
      const cut = this.#cut(bytes, from);
      yield bytes.toString("utf8", from, cut);
      from = cut;
    }
    yield bytes.toString("utf8", from, end);
  }

  #cut(bytes: Buffer, from: number): number {
    let cut = from + this.#max;
    // At most three: beyond that it is no UTF-8 anyway.
    for (let back = 0; back < 3 && (bytes[cut] & 0xc0) === 0x80; back++) cut--;
    return cut > from ? cut : from + this.#max;
  }
}
