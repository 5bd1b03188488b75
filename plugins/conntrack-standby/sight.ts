import type { Logger } from "@logtape/logtape";
import type { Conntrack } from "../../main.ts";
import { messageOf } from "../shared/errors.ts";
import type { Clock } from "../shared/clock.ts";
import type { Dumps } from "./dumps.ts";

/** Milliseconds from a dump that failed to the next. */
const RETRY = { first: 500, last: 10_000 };

export interface SightListener {
  lost(): void;
  /** `blindFor` in milliseconds. */
  regained(blindFor: number): void;
}

/**
 * Whether what is known of the flows is all there is. Once events may have been missed it is not, until the source is
 * connected again and a dump that began after that is merged; until then nothing sleeps.
 */
export class Sight {
  readonly #parts: { conntrack: Conntrack; clock: Clock; log: Logger };
  readonly #dumps: Dumps;
  readonly #listener: SightListener;
  #following: Disposable | undefined;
  #since: number | null;
  #losses = 0;
  #resyncing = false;
  #failing = false;
  #closed = false;
  #endPause: (() => void) | undefined;

  constructor(parts: { conntrack: Conntrack; clock: Clock; log: Logger }, dumps: Dumps, listener: SightListener) {
    this.#parts = parts;
    this.#dumps = dumps;
    this.#listener = listener;
    this.#since = parts.clock.now();
  }

  get blind(): boolean {
    return this.#since !== null;
  }

  /** Resolves after the first dump, also where it failed: then it goes on trying. */
  async open(): Promise<void> {
    const { conntrack, log, clock } = this.#parts;
    this.#following = conntrack.follow({
      lost: (reason) => {
        this.#losses++;
        if (this.#since === null) log.warn("Connections may be missed, nothing sleeps: {reason}", { reason });
        this.#since ??= clock.now();
        this.#listener.lost();
      },
      connected: () => void this.#resync(),
    });
    const first = this.#dumps.take();
    void this.#resync(first);
    await Promise.allSettled([first]);
  }

  /** A dump for what events may have missed; where it fails, all stays as it was. */
  async refresh(why: string): Promise<void> {
    const { log } = this.#parts;
    try {
      await this.#dumps.take();
      if (this.#failing) log.info("The kernel's table of connections can be read again");
      this.#failing = false;
    } catch (error) {
      const reason = messageOf(error);
      if (!this.#failing) log.warn("Cannot dump connections for the {why}: {reason}", { why, reason, error });
      this.#failing = true;
    }
  }

  close(): void {
    this.#closed = true;
    this.#following?.[Symbol.dispose]();
    this.#endPause?.();
  }

  async #resync(dump?: Promise<void>): Promise<void> {
    if (this.#resyncing) return; // what was lost since is counted, and has it dumped again
    this.#resyncing = true;
    const { conntrack, clock, log } = this.#parts;
    // Without an error there are events: a `connected` that comes later calls again.
    for (let wait = RETRY.first; !this.#closed && conntrack.error === null;) {
      const losses = this.#losses;
      try {
        await (dump ?? this.#dumps.take());
        if (losses === this.#losses) break;
      } catch (error) {
        const reason = messageOf(error);
        log.warn("Cannot dump connections, nothing sleeps: {reason}", { reason, error });
        await this.#pause(wait);
        wait = Math.min(wait * 2, RETRY.last);
      }
      dump = undefined;
    }
    this.#resyncing = false;
    if (this.#closed || conntrack.error !== null || this.#since === null) return;
    const blindFor = Math.max(0, clock.now() - this.#since);
    this.#since = null;
    this.#listener.regained(blindFor);
  }

  #pause(ms: number): Promise<void> {
    return new Promise((resolve) => {
      const cancel = this.#parts.clock.after(ms, resolve);
      this.#endPause = () => {
        cancel();
        resolve();
      };
    });
  }
}
