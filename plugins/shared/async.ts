/// <reference path="./std-async.d.ts" />
import { abortable } from "@std/async/async/abortable.js";

export { abortable };
export { delay } from "@std/async/async/delay.js";
export { retry } from "@std/async/async/retry.js";

/** Beyond it `setTimeout` overflows and fires at once. */
const LONGEST_TIMER = 2 ** 31 - 1;

/** Whether a handler's result must be waited for. Handlers return what they like, such as the number of a `push`. */
export function isPromise(value: unknown): value is PromiseLike<unknown> {
  return typeof (value as { then?: unknown } | null | undefined)?.then === "function";
}

/**
 * Settles as `work` does, or rejects after `ms` milliseconds with a `TimeoutError`. The timer is freed on every path,
 * which deno-std's own `deadline` leaves to the garbage collector.
 *
 * @throws {DOMException} `TimeoutError` at the deadline, with `what` in its message
 */
export async function deadline<T>(work: Promise<T>, ms: number, what: string): Promise<T> {
  const expired = new AbortController();
  const reason = () => new DOMException(`${what} ran past its deadline of ${ms} ms`, "TimeoutError");
  const timer = setTimeout(() => expired.abort(reason()), Math.min(ms, LONGEST_TIMER));
  try {
    return await abortable(Promise.resolve(work), expired.signal);
  } finally {
    clearTimeout(timer);
  }
}

/** Runs `work` for every item, at most `width` at a time; rejects with the first error, after all have ended. */
export async function pooled<T>(
  width: number,
  items: readonly T[],
  work: (item: T) => Promise<unknown>,
): Promise<void> {
  let next = 0;
  const worker = async () => {
    while (next < items.length) await work(items[next++]);
  };
  const results = await Promise.allSettled(Array.from({ length: Math.min(width, items.length) }, worker));
  for (const result of results) if (result.status === "rejected") throw result.reason;
}
