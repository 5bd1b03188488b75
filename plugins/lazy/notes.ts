import type { Hypervisor, NoteKind } from "../../main.ts";
import { formatDuration } from "../shared/duration.ts";
import { ACTOR } from "./entry.ts";
import type { Ledger } from "./ledger.ts";

export const KINDS = {
  lazy_start: {
    help: "An acquire has started or restored an instance, and it is ready",
    event: "container.lazy_started",
  },
  lazy_start_failed: { help: "An acquire could not make an instance ready", event: "container.lazy_start_failed" },
  lazy_stop: { help: "An instance without a lease was stopped or put to standby", event: "container.lazy_stopped" },
  lazy_stop_failed: { help: "An instance without a lease could not be stopped", event: "container.lazy_stop_failed" },
} satisfies Record<string, NoteKind>;
export type Kind = keyof typeof KINDS;

/** Writes the notes about lazy instances, and counts them. */
export class Notes {
  readonly #hypervisor: Hypervisor;
  readonly #ledger: Ledger;

  constructor(hypervisor: Hypervisor, ledger: Ledger) {
    this.#hypervisor = hypervisor;
    this.#ledger = ledger;
  }

  /** Each returns whether the instance is still there; `within` is written with the note or not at all. */
  started(id: string, latency_ms: number, within: () => void): boolean {
    const ms = Math.round(latency_ms);
    return this.#write("lazy_start", id, "acquire", `is ready after ${ms} ms`, { latency_ms: ms }, within);
  }

  startFailed(id: string, error: string, within: () => void): boolean {
    return this.#write("lazy_start_failed", id, "acquire", `could not be made ready: ${error}`, { error }, within);
  }

  stopped(id: string, idle_seconds: number, within: () => void): boolean {
    const time = formatDuration(idle_seconds * 1000);
    return this.#write("lazy_stop", id, "idle", `was stopped after ${time} without a lease`, { idle_seconds }, within);
  }

  stopFailed(id: string, error: string): boolean {
    return this.#write("lazy_stop_failed", id, "idle", `could not be stopped: ${error}`, { error });
  }

  #write(type: Kind, id: string, cause: string, what: string, detail: Record<string, unknown>, within?: () => void) {
    const name = this.#hypervisor.find(id)?.name;
    const draft = {
      type,
      origin: { actor: ACTOR, cause },
      summary: `"${name}" ${what}`,
      detail: { instance: id, ...detail },
    };
    const note = this.#hypervisor.note(id, draft, within);
    if (note) this.#ledger.take(note);
    return note !== undefined;
  }
}
