/// <reference path="./std-async.d.ts" />
import { abortable } from "@std/async/async/abortable.js";

export { abortable };
export { delay } from "@std/async/async/delay.js";
export { retry } from "@std/async/async/retry.js";

/**
 * Settles as `work` does, or rejects after `ms` milliseconds with a `TimeoutError`. The timer is freed on every path,
 * which deno-std's own `deadline` leaves to the garbage collector.
 *
 * @throws {DOMException} `TimeoutError` at the deadline, with `what` in its message
 */
export async function deadline<T>(work: Promise<T>, ms: number, what: string): Promise<T> {
  const expired = new AbortController();
  const reason = () => new DOMException(`${what} ran past its deadline of ${ms} ms`, "TimeoutError");
  const timer = setTimeout(() => expired.abort(reason()), ms);
  try {
    return await abortable(work, expired.signal);
  } finally {
    clearTimeout(timer);
  }
}
