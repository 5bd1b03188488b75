import type { Logger } from "@logtape/logtape";
import { SSEStreamingApi } from "hono/streaming";
import { DormouseError, type EventStream, type MaybePromise } from "../../main.ts";
import { bodyOf, chainOf, toDormouseError } from "./errors.ts";

/** Milliseconds; proxies close streams that are quiet for 30 to 60 seconds. */
const HEARTBEAT_EVERY = 15_000;
const MAX_STREAMS = 256;
const HEADERS = {
  "Content-Type": "text/event-stream",
  "Cache-Control": "no-cache",
  // nginx would gather events until its buffer is full.
  "X-Accel-Buffering": "no",
};

/** Streams of Server-Sent Events: bounded in number, with a heartbeat at once, which flushes the headers, and then on. */
export class Streams {
  readonly #log: Logger;
  #open = 0;

  constructor(log: Logger) {
    this.#log = log;
  }

  /** How many are open now. */
  get open(): number {
    return this.#open;
  }

  /**
   * Answers with a stream that ends when `work` does, the client leaves or the call's signal aborts. An error of `work`
   * is sent as an `error` event, for the status is sent by then.
   *
   * @throws {DormouseError} `rate_limited`
   */
  answer(
    { id, signal }: { id: string; signal: AbortSignal },
    work: (stream: EventStream) => MaybePromise<void>,
  ): Response {
    if (this.#open >= MAX_STREAMS) {
      throw new DormouseError("rate_limited", `Cannot open a stream: ${MAX_STREAMS} are open`);
    }
    this.#open++;
    const { readable, writable } = new TransformStream<Uint8Array, Uint8Array>();
    const api = new SSEStreamingApi(writable, readable);
    const ended = new AbortController();
    let writing = 0;
    const send = async (write: Promise<unknown>) => {
      writing++;
      await write;
      writing--;
    };
    // A heartbeat behind what the client has not taken yet would only use memory.
    const beat = () => void (writing === 0 && send(api.write(": heartbeat\n\n")));
    const timer = setInterval(beat, HEARTBEAT_EVERY);
    // A client that does not read must not hold up the closing of the host.
    const stop = () => (ended.abort(), void (writing > 0 && api.abort()));
    api.onAbort(() => ended.abort());
    signal.addEventListener("abort", stop, { once: true });
    const run = async () => {
      try {
        // Even then it is run, to let go of what it was given.
        if (signal.aborted) stop();
        await work({ send: (message) => send(api.writeSSE(message)), signal: ended.signal });
      } catch (error) {
        // What breaks off because the client left is no failure.
        if (ended.signal.aborted) return;
        this.#log.error("Stream of request {id} failed: {reason}", { id, reason: chainOf(error), error });
        await api.writeSSE({ event: "error", data: JSON.stringify(bodyOf(toDormouseError(error, id))) });
      } finally {
        clearInterval(timer);
        signal.removeEventListener("abort", stop);
        this.#open--;
        // What is left while the client still has to take something would wait for as long as it likes.
        if (writing > 0) api.abort();
        void api.close();
      }
    };
    beat();
    void run();
    return new Response(api.responseReadable as ReadableStream<Uint8Array>, { headers: HEADERS });
  }
}
