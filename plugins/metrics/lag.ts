import { type Clock, systemClock } from "../shared/clock.ts";

/** Milliseconds between two looks. */
export const PERIOD = 100;

/**
 * Tells how late a timer rings, in seconds, again and again: what else the event loop does holds it up. By a timer of our
 * own, for Deno's `monitorEventLoopDelay` tells of microseconds also where the loop was blocked for 300 ms.
 */
export function watchLag(clock: Clock, tell: (seconds: number) => void): Disposable {
  let cancel = () => {};
  const arm = () => {
    const due = clock.now() + PERIOD;
    cancel = clock.after(PERIOD, () => {
      tell(Math.max(0, clock.now() - due) / 1_000);
      arm();
    });
  };
  arm();
  return { [Symbol.dispose]: () => cancel() };
}

/** Never steps, for what is measured rather than told. */
export const steadyClock: Clock = { ...systemClock, now: () => performance.now() };
