// deno-std ships JavaScript only; these are the signatures of the files that plugins/shared/async.ts uses.
declare module "@std/async/async/abortable.js" {
  export function abortable<T>(promise: Promise<T>, signal: AbortSignal): Promise<T>;
}
declare module "@std/async/async/delay.js" {
  export function delay(ms: number, options?: { signal?: AbortSignal }): Promise<void>;
}
declare module "@std/async/async/retry.js" {
  export interface RetryOptions {
    multiplier?: number;
    maxTimeout?: number;
    maxAttempts?: number;
    minTimeout?: number;
    jitter?: number;
    isRetriable?: (error: unknown) => boolean;
    signal?: AbortSignal;
  }
  export function retry<T>(work: () => Promise<T> | T, options?: RetryOptions): Promise<T>;
}
