import { type FSWatcher, mkdirSync, watch } from "node:fs";
import type { Logger } from "@logtape/logtape";
import { messageOf } from "../shared/errors.ts";

/**
 * Notices exits at once: one watch over the folder where shims put them, the same for instances that were started by
 * this host and for those it took over. Where the kernel has no watch left, the registry's reconcile finds them later.
 */
export class Exits implements Disposable {
  readonly folder: string;
  readonly #watcher: FSWatcher | undefined;
  readonly #waiting = new Map<string, Set<() => void>>();

  constructor(folder: string, log: Logger, exited: (id: string) => void) {
    this.folder = folder;
    mkdirSync(folder, { recursive: true });
    const failed = (error: unknown) =>
      log.warn("Cannot watch {folder}: {reason}; exits are noticed by the reconcile", {
        folder,
        reason: messageOf(error),
      });
    try {
      this.#watcher = watch(folder, (_, name) => {
        const id = name?.split(".")[0];
        if (!id) return;
        for (const wake of this.#waiting.get(id) ?? []) wake();
        exited(id);
      });
      this.#watcher.on("error", failed);
    } catch (error) {
      failed(error);
    }
  }

  /** Resolves at the next sign of an exit of the instance, after `ms` milliseconds, or when `signal` aborts. */
  next(id: string, ms: number, signal?: AbortSignal): Promise<void> {
    return new Promise((resolve) => {
      const waiting = this.#waiting.get(id) ?? new Set();
      this.#waiting.set(id, waiting);
      const done = () => {
        clearTimeout(timer);
        signal?.removeEventListener("abort", done);
        waiting.delete(done);
        if (waiting.size === 0) this.#waiting.delete(id);
        resolve();
      };
      const timer = setTimeout(done, ms);
      waiting.add(done);
      signal?.addEventListener("abort", done, { once: true });
      if (signal?.aborted) done();
    });
  }

  [Symbol.dispose](): void {
    this.#watcher?.close();
  }
}
