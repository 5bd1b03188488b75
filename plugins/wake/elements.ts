import { readFileSync, writeFileSync } from "node:fs";
import type { Logger } from "@logtape/logtape";
import { delay } from "../shared/async.ts";
import { messageOf } from "../shared/errors.ts";
import { run } from "../shared/run.ts";
import { changed, type Place, rebuilt, removed, type Target } from "./rules.ts";

const RETRY_MS = 1_000;

/**
 * The ports that the kernel forwards by itself. It outlives the host: instances run on without it, and so do their
 * ports. Changes that come while one is being made go together into the next.
 */
export class Elements {
  readonly #place: Place;
  readonly #log: Logger;
  readonly #closing: AbortSignal;
  readonly #wanted = new Map<number, Target>();
  /** What the kernel has, undefined where that is not known. */
  #applied: ReadonlyMap<number, Target> | undefined;
  #current: Promise<void> = Promise.resolve();
  #next: Promise<void> | undefined;
  #retrying = false;

  constructor(place: Place, log: Logger, closing: AbortSignal) {
    this.#place = place;
    this.#log = log;
    this.#closing = closing;
  }

  has(port: number): boolean {
    return this.#wanted.has(port);
  }

  /** Takes effect with the next {@linkcode Elements.flush}; undefined takes the port out. */
  set(port: number, target: Target | undefined): void {
    const old = this.#wanted.get(port);
    if (target === undefined) this.#wanted.delete(port);
    else if (old?.ip !== target.ip || old.ip6 !== target.ip6 || old.port !== target.port) {
      this.#wanted.set(port, target);
    }
  }

  /**
   * Resolves once the kernel has all that was set before the call.
   *
   * @throws {CommandError} where it refuses; it is tried again, with all there is, until it does not
   */
  flush(): Promise<void> {
    return this.#next ??= this.#current.catch(() => {}).then(() => {
      this.#next = undefined;
      return this.#current = this.#apply();
    });
  }

  /** {@linkcode Elements.flush} for those who have nobody to tell. */
  flushLater(): void {
    this.flush().catch((error) => {
      this.#log.error("Cannot change the rules of published ports: {reason}", { reason: messageOf(error), error });
      void this.#retry();
    });
  }

  async #retry(): Promise<void> {
    if (this.#retrying) return;
    this.#retrying = true;
    await delay(RETRY_MS, { signal: this.#closing }).catch(() => {});
    this.#retrying = false;
    if (!this.#closing.aborted) this.flushLater(); // else the next host makes the tables anew
  }

  /** Removes the tables, for good. */
  static async purge(bridge: string): Promise<void> {
    await run("nft", ["-f", "-"], { input: removed(bridge) });
    if (localRouting(bridge) === "1") localRouting(bridge, "0");
  }

  async #apply(): Promise<void> {
    const wanted = new Map(this.#wanted);
    const { bridge } = this.#place;
    const input = this.#applied ? changed(bridge, this.#applied, wanted) : rebuilt(this.#place, wanted);
    if (input === "") return;
    const whole = this.#applied === undefined;
    this.#applied = undefined;
    await run("nft", ["-f", "-"], { input });
    // Not before the guard is there: from here on packets for 127.0.0.1 may cross the bridge.
    if (whole && localRouting(bridge) !== "1") localRouting(bridge, "1");
    this.#applied = wanted;
  }
}

/** Reads, or sets, whether 127.0.0.1 of the host may talk over the bridge. Null where there is no bridge. */
function localRouting(bridge: string, value?: string): string | null {
  const file = `/proc/sys/net/ipv4/conf/${bridge}/route_localnet`;
  try {
    if (value !== undefined) writeFileSync(file, value);
    return readFileSync(file, "utf8").trim();
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return null;
    throw error;
  }
}
