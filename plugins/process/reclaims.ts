import type { Logger } from "@logtape/logtape";
import { Cgroup } from "../shared/cgroup.ts";
import { messageOf } from "../shared/errors.ts";
import type { Enclosure } from "./enclosure.ts";

/** Memory of sleeping instances on its way back to the kernel: in the background, as a slow disk makes it slow. */
export class Reclaims implements AsyncDisposable {
  readonly #log: Logger;
  readonly #running = new Map<string, { stop: AbortController; done: Promise<void> }>();

  constructor(log: Logger) {
    this.#log = log;
  }

  begin(id: string, enclosure: Enclosure): void {
    if (!(enclosure instanceof Cgroup)) return;
    const stop = new AbortController();
    const failed = (error: unknown) =>
      this.#log.warn("Cannot reclaim memory of {id}: {reason}", { id, reason: messageOf(error), error });
    const done = enclosure.reclaim(stop.signal).catch(failed).finally(() => {
      if (this.#running.get(id)?.stop === stop) this.#running.delete(id);
    });
    this.#running.set(id, { stop, done });
  }

  /** Stops after the piece that the kernel is at. */
  async end(id: string): Promise<void> {
    const running = this.#running.get(id);
    running?.stop.abort();
    await running?.done;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await Promise.all([...this.#running.keys()].map((id) => this.end(id)));
  }
}
