import type { Logger } from "@logtape/logtape";
import { messageOf } from "./errors.ts";
import { InstanceLog, type LogOptions } from "./logs.ts";

/** Between two looks at the sizes of the logs of what runs. */
const ROTATE_MS = 1_000;

/** The logs of all instances that somebody reads or that are written to, and their rotation. */
export class LogKeeper implements AsyncDisposable {
  readonly #options: LogOptions;
  readonly #log: Logger;
  readonly #logs = new Map<string, InstanceLog>();
  readonly #watched = new Set<string>();
  #timer: ReturnType<typeof setTimeout> | undefined;
  #rotating: Promise<void> = Promise.resolve();

  constructor(options: LogOptions, log: Logger) {
    this.#options = options;
    this.#log = log;
    this.#arm();
  }

  /** One object for each log, so that its readers and its rotation know of each other. */
  of(id: string, file: string): InstanceLog {
    let log = this.#logs.get(id);
    if (!log) this.#logs.set(id, log = new InstanceLog(file, this.#options));
    return log;
  }

  /** Rotates it from now on. */
  watch(id: string): void {
    this.#watched.add(id);
  }

  /** Rotates it once more and then no longer: nobody writes to it. */
  unwatch(id: string): void {
    if (this.#watched.delete(id)) void this.#rotate(id);
  }

  /** Rotates it no longer, and lets go of it; resolves when its files are nobody's. */
  async forget(id: string): Promise<void> {
    this.#watched.delete(id);
    const log = this.#logs.get(id);
    this.#logs.delete(id);
    await log?.idle();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    clearTimeout(this.#timer);
    this.#timer = undefined;
    await this.#rotating;
  }

  #arm(): void {
    this.#timer = setTimeout(() => {
      this.#rotating = this.#rotateAll().finally(() => {
        if (this.#timer !== undefined) this.#arm();
      });
    }, ROTATE_MS);
  }

  async #rotateAll(): Promise<void> {
    for (const id of [...this.#watched]) if (this.#watched.has(id)) await this.#rotate(id);
  }

  async #rotate(id: string): Promise<void> {
    try {
      await this.#logs.get(id)?.rotate();
    } catch (error) {
      this.#log.warn("Cannot rotate the log of {id}: {reason}", { id, reason: messageOf(error), error });
    }
  }
}
