import { DormouseError } from "../../main.ts";
import { OVERTAKES, type Request } from "./states.ts";

/** What runs in a lane: a request, a creation, or a look at what the driver says. */
export type Work = Request | "create" | "look";

interface Turn {
  work: Work;
  abort: AbortController;
  promise: Promise<unknown>;
  run(): Promise<void>;
}

/**
 * One lane for each instance: turns run one at a time, in the order in which they were asked. A turn of the same kind as
 * the last one joins it; one that overtakes the turn under way aborts it first. A lane lives as long as anyone is in it,
 * also past its instance's deletion, so two holders never stand in different lanes of one instance.
 */
export class Lanes {
  readonly #lanes = new Map<string, Turn[]>();
  readonly #idle = new Set<() => void>();
  readonly #listeners: ((id: string) => void)[] = [];
  #closed: DormouseError | undefined;

  /**
   * Runs `turn` when its time comes; the signal aborts when a later request overtakes it. `joins` is false for turns
   * that differ from each other, such as two updates.
   */
  enter<T>(id: string, work: Work, turn: (signal: AbortSignal) => Promise<T>, { joins = true } = {}): Promise<T> {
    if (this.#closed) return Promise.reject(this.#closed);
    const lane = this.#lanes.get(id) ?? [];
    // What comes after a deletion finds nothing, so a second deletion joins the first wherever that stands.
    const last = (work === "delete" && lane.find((turn) => turn.work === work)) || lane.at(-1);
    // A look under way may have read the driver before what it was asked to look at happened.
    const joinable = joins && last?.work === work && !(work === "look" && lane.length === 1);
    if (joinable && !last.abort.signal.aborted) return last.promise as Promise<T>;

    const { promise, resolve, reject } = Promise.withResolvers<T>();
    const abort = new AbortController();
    lane.push({ work, abort, promise, run: () => turn(abort.signal).then(resolve, reject) });
    if (lane.length === 1) {
      this.#lanes.set(id, lane);
      void this.#drive(id, lane);
    } else {
      this.#overtake(lane[0], work);
    }
    return promise;
  }

  /** The turns that wait or run, the one under way first. */
  pending(id: string): Work[] {
    return this.#lanes.get(id)?.map((turn) => turn.work) ?? [];
  }

  /** Calls `listener` whenever a turn has ended and is pending no more. */
  onEnd(listener: (id: string) => void): void {
    this.#listeners.push(listener);
  }

  /** Resolves once the turns have ended that are now in lanes that `concerns`. */
  async settled(concerns: (id: string) => boolean): Promise<void> {
    const turns = [...this.#lanes].filter(([id]) => concerns(id)).flatMap(([, lane]) => lane);
    await Promise.allSettled(turns.map(({ promise }) => promise));
  }

  /** No turn is taken in from now on; resolves once those that were have ended. */
  async close(): Promise<void> {
    this.#closed = new DormouseError("shutting_down", "The host is closing");
    if (this.#lanes.size > 0) await new Promise<void>((resolve) => this.#idle.add(resolve));
  }

  #overtake(current: Turn, by: Work): void {
    if (current.work === "look" || current.work === "create" || by === "look" || by === "create") return;
    if (!(OVERTAKES[current.work] as Request[]).includes(by)) return;
    current.abort.abort(new DormouseError("aborted", `Aborted the ${current.work}: overtaken by a ${by}`));
  }

  async #drive(id: string, lane: Turn[]): Promise<void> {
    while (lane.length > 0) {
      const [turn] = lane;
      for (const waiting of lane.slice(1)) this.#overtake(turn, waiting.work);
      await turn.run();
      lane.shift();
      for (const listener of this.#listeners) listener(id);
    }
    this.#lanes.delete(id);
    if (this.#lanes.size > 0) return;
    for (const resolve of this.#idle) resolve();
    this.#idle.clear();
  }
}
