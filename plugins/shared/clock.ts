/** The longest delay that `setTimeout` takes; beyond it it fires at once. */
const LONGEST = 2 ** 31 - 1;

/** Time as a plugin sees it, so that a test can be its own clock. */
export interface Clock {
  /** Milliseconds since the epoch. It may step, in either direction. */
  now(): number;
  /** Calls once after `ms` milliseconds or earlier, which the caller checks; returns what cancels it. */
  after(ms: number, call: () => void): () => void;
}

export const systemClock: Clock = {
  now: Date.now,
  after(ms, call) {
    const timer = setTimeout(call, Math.min(Math.max(Math.ceil(ms), 0), LONGEST));
    return () => clearTimeout(timer);
  },
};

/** A stretch of time that keeps an instance awake: `ms` milliseconds from `from`, in milliseconds since the epoch. */
export interface Span {
  readonly from: number;
  readonly ms: number;
}

/** The span as it is to be counted now: one from the future was made before the clock stepped back, and begins now. */
export function settled<S extends Span | null>(span: S, now: number): S {
  return span !== null && span.from > now ? { ...span, from: now } : span;
}

/** When the span is over; in the past where there is none. */
export function endOf(span: Span | null): number {
  return span === null ? -Infinity : span.from + span.ms;
}
