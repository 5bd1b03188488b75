import { DormouseError } from "../../main.ts";
import { messageOf } from "../shared/errors.ts";
import { ACTOR, type Entry } from "./entry.ts";
import type { Parts } from "./keeper.ts";

/** Milliseconds; failures in a row do not make the pause longer than this. */
const LONGEST_PAUSE = 600_000;
/** Codes of stops that another action came before: somebody uses the instance, and the idle window begins anew. */
const OVERTAKEN = ["aborted", "invalid_state", "not_found", "shutting_down"];

export interface StopsOptions extends Parts {
  maxConcurrent: number;
  retryBackoff: number;
  isDue(entry: Entry): boolean;
  sayStopped(entry: Entry): void;
  settled(entry: Entry): void;
}

/** Stops instances that nobody needs: at most so many at a time, the others in the order in which they came. */
export class Stops {
  readonly #options: StopsOptions;
  readonly #queue = new Set<Entry>();
  readonly #running = new Set<Promise<void>>();
  #closed = false;

  constructor(options: StopsOptions) {
    this.#options = options;
  }

  /** For an instance whose time has come; whether it still has is asked anew when it is its turn. */
  offer(entry: Entry): void {
    if (this.#closed) return;
    this.#queue.add(entry);
    this.#pump();
  }

  async close(): Promise<void> {
    this.#closed = true;
    await Promise.all(this.#running);
  }

  #pump(): void {
    const { isDue, maxConcurrent } = this.#options;
    for (const entry of this.#queue) {
      if (this.#closed || this.#running.size >= maxConcurrent) return;
      this.#queue.delete(entry);
      if (!isDue(entry)) continue;
      const run = this.#stop(entry).finally(() => {
        this.#running.delete(run);
        this.#pump();
      });
      this.#running.add(run);
    }
  }

  async #stop(entry: Entry): Promise<void> {
    const { hypervisor, sayStopped, settled, log } = this.#options;
    const { id, terms: { via } } = entry;
    // What is found idle here is asked for in the same breath, so that it overtakes no start.
    entry.stopping = { phase: hypervisor.find(id)!.phases.since, freeSince: entry.freeSince };
    const [done] = await Promise.allSettled([hypervisor[via](id, { actor: ACTOR, cause: "idle" })]);
    entry.stopping = undefined;
    try {
      if (done.status === "rejected") this.#failed(entry, done.reason);
      else sayStopped(entry);
      settled(entry);
    } catch (error) {
      log.error("Stopping idle instance {id} went wrong: {reason}", { id, reason: messageOf(error), error });
    }
  }

  #failed(entry: Entry, error: unknown): void {
    const { clock, notes, retryBackoff } = this.#options;
    const { code, details } = error instanceof DormouseError ? error : { code: "internal_error", details: undefined };
    // A lease came in between, which is as it should be.
    if (code === "vetoed" && details?.plugin === ACTOR) return;
    const now = clock.now();
    if (OVERTAKEN.includes(code)) return void (entry.freeSince = now);
    const failures = (entry.retry?.failures ?? 0) + 1;
    entry.retry = { from: now, ms: Math.min(retryBackoff * 2 ** (failures - 1), LONGEST_PAUSE), failures };
    notes.stopFailed(entry.id, messageOf(error));
  }
}
