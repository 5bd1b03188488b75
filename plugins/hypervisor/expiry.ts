import type { Logger } from "@logtape/logtape";
import { messageOf } from "../shared/errors.ts";
import { type Registry, remove } from "./lifecycle.ts";

/** The longest sleep between two sweeps, in milliseconds: a clock that was set forward is noticed by then. */
const LONGEST = 60_000;

/** Deletes instances past their `expires_at`. Each on its own, so that one whose deletion hangs holds up no other. */
export class Reaper implements Disposable {
  readonly #registry: Registry;
  readonly #log: Logger;
  #timer: ReturnType<typeof setTimeout> | undefined;

  constructor(registry: Registry, log: Logger) {
    this.#registry = registry;
    this.#log = log;
  }

  /** Deletes what is due, and comes back for the next. Also to be called when an expiry changes. */
  sweep = (): void => {
    clearTimeout(this.#timer);
    const { records, lanes, now } = this.#registry;
    let soonest = Infinity;
    for (const { id, name, expires_at } of records.all()) {
      if (expires_at === null) continue;
      if (expires_at > now()) soonest = Math.min(soonest, expires_at);
      else if (lanes.pending(id).length === 0) void this.#expire(id, name);
    }
    this.#timer = setTimeout(this.sweep, Math.min(Math.max(soonest - now(), 1), LONGEST));
  };

  [Symbol.dispose](): void {
    clearTimeout(this.#timer);
  }

  async #expire(id: string, name: string): Promise<void> {
    try {
      await remove(this.#registry, id, { actor: "system", cause: "expired" });
    } catch (error) {
      this.#log.warn("Deleting expired instance {name} failed, next try at the next sweep: {reason}", {
        name,
        id,
        reason: messageOf(error),
        error,
      });
    }
  }
}
