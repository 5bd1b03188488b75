import { setImmediate as turn } from "node:timers/promises";
import type { Logger } from "@logtape/logtape";
import type { Api, ApiCall, EventStream } from "../../main.ts";
import type { Clock } from "../shared/clock.ts";
import type { Frame, Reader } from "./reader.ts";
import type { Rows } from "./rows.ts";
import type { Tail } from "./tail.ts";

export interface StreamParts {
  rows: Rows;
  reader: Reader;
  tail: Tail;
  clock: Clock;
  log: Logger;
  /** Milliseconds within which a client has to take a message. */
  timeout: number;
}
/** What a client asks for. */
export interface Wish {
  /** The id of the last message it has got; undefined for what comes from now on. */
  last: string | undefined;
  instance: string | undefined;
  wants(frame: Frame): boolean;
}

/**
 * Streams to clients. Each is a loop over the table: what is above its number, then wait for a commit. So a replay turns
 * into a live stream without a seam, and a client that is slow holds up nobody and misses nothing.
 */
export class Streams {
  readonly #parts: StreamParts;
  #open = 0;

  constructor(parts: StreamParts) {
    this.#parts = parts;
  }

  get open(): number {
    return this.#open;
  }

  /** @throws {DormouseError} `rate_limited` */
  answer(api: Api, call: ApiCall, wish: Wish): Response {
    // Read now: what is committed before the client has its headers is above it.
    const { last } = this.#parts.rows;
    return api.stream(call, async (stream) => {
      this.#open++;
      try {
        if (await this.#follow(stream, wish, last)) return;
        this.#parts.log.info("Client of request {id} takes its events too slowly: disconnected", { id: call.id });
      } finally {
        this.#open--;
      }
    });
  }

  /** Resolves to false where the client is too slow. */
  async #follow(stream: EventStream, { last, instance, wants }: Wish, now: number): Promise<boolean> {
    const { rows, reader, tail } = this.#parts;
    const known = last === undefined ? now : numberOf(last);
    let seq = known > now ? 0 : known;
    // What the client was told of: from there on nothing is missing.
    let told = seq === known ? 0 : -1;
    let wake = () => {};
    using _subscription = rows.follow(() => wake());
    stream.signal.addEventListener("abort", () => wake(), { once: true });
    while (!stream.signal.aborted) {
      // Retention may also overtake a client in the middle of a long replay.
      if (told === -1 || (seq + 1 < rows.first && told < rows.first)) {
        const { first } = rows;
        const data = JSON.stringify({ last_event_id: told === -1 ? last : String(seq), first, last: rows.last });
        seq = Math.max(seq, reader.oldest - 1);
        told = first;
        if (!await this.#send(stream, { id: String(seq), event: "reset", data })) return false;
      }
      const { frames, to } = tail.after(seq, instance);
      for (const frame of frames) {
        if (stream.signal.aborted) return true;
        const wanted = (instance === undefined || frame.instance_id === instance) && wants(frame);
        if (wanted && !await this.#send(stream, frame.message)) return false;
      }
      seq = to;
      // A filter that nothing passes would else go through the whole table in one turn.
      if (seq < rows.last) await turn();
      else if (!stream.signal.aborted) await new Promise<void>((resolve) => wake = resolve);
    }
    return true;
  }

  async #send(stream: EventStream, message: Frame["message"]): Promise<boolean> {
    const late = Promise.withResolvers<boolean>();
    const cancel = this.#parts.clock.after(this.#parts.timeout, () => late.resolve(false));
    try {
      return await Promise.race([stream.send(message).then(() => true), late.promise]);
    } finally {
      cancel();
    }
  }
}

/** The number that an id stands for, infinite for one that was never ours. */
function numberOf(id: string): number {
  return /^\d{1,15}$/.test(id) ? Number(id) : Infinity;
}
