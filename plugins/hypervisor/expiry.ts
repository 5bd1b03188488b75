import type { Logger } from "@logtape/logtape";
import { deadline } from "../shared/async.ts";
import { messageOf } from "../shared/errors.ts";
import { type Registry, remove } from "./lifecycle.ts";

/** The longest sleep between two sweeps, in milliseconds: a clock that was set forward is noticed by then. */
const LONGEST = 60_000;
/** Deletions side by side: thousands may be due at once, after a night in which the host was off. */
const WIDTH = 16;
/** Milliseconds after which a deletion gives its place to the next one; it goes on all the same. */
const SLOT = 30_000;

/** Deletes instances past their `expires_at`. One whose deletion hangs holds up the others for a while at most. */
export class Reaper implements Disposable {
  readonly #registry: Registry;
  readonly #log: Logger;
  readonly #due = new Set<string>();
  #timer: ReturnType<typeof setTimeout> | undefined;
  #busy = 0;
  #disposed = false;

  constructor(registry: Registry, log: Logger) {
    this.#registry = registry;
    this.#log = log;
  }

  /** Deletes what is due, and comes back for the next. Also to be called when an expiry changes. */
  sweep = (): void => {
    clearTimeout(this.#timer);
    // An action that was under way when the host began to close ends after this, and may call.
    if (this.#disposed) return;
    const { records, now } = this.#registry;
    let soonest = Infinity;
    for (const { id, expires_at } of records.all()) {
      if (expires_at === null) continue;
      if (expires_at > now()) soonest = Math.min(soonest, expires_at);
      else this.#due.add(id);
    }
    this.#timer = setTimeout(this.sweep, Math.min(Math.max(soonest - now(), 1), LONGEST));
    this.#next();
  };

  [Symbol.dispose](): void {
    this.#disposed = true;
    clearTimeout(this.#timer);
    this.#due.clear();
  }

  #next(): void {
    for (const id of this.#due) {
      if (this.#busy >= WIDTH) return;
      this.#due.delete(id);
      void this.#expire(id);
    }
  }

  async #expire(id: string): Promise<void> {
    const { records, lanes, now } = this.#registry;
    const { name, expires_at } = records.find(id) ?? { name: id, expires_at: null };
    // It may have waited for its place, and be gone or have got more time; one that is busy is left to the next sweep.
    if (expires_at === null || expires_at > now() || lanes.pending(id).length > 0) return;
    this.#busy++;
    try {
      await deadline(remove(this.#registry, id, { actor: "system", cause: "expired" }), SLOT, "it");
    } catch (error) {
      this.#log.warn("Deleting expired instance {name} failed, next try at the next sweep: {reason}", {
        name,
        id,
        reason: messageOf(error),
        error,
      });
    } finally {
      this.#busy--;
      this.#next();
    }
  }
}
