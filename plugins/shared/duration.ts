const UNITS_MS: Record<string, number> = {
  ns: 1e-6,
  us: 1e-3,
  "µs": 1e-3, // U+00B5, the micro sign
  "μs": 1e-3, // U+03BC, the Greek letter
  ms: 1,
  s: 1000,
  m: 60_000,
  h: 3_600_000,
};
// `\d+(?:\.\d*)?` and not `\d+\.?\d*`, which takes quadratic time over a long row of digits.
const WHOLE = /^[+-]?(?:(?:\d+(?:\.\d*)?|\.\d+)(?:ns|us|µs|μs|ms|s|m|h))+$/;
const PART = /(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|μs|ms|s|m|h)/g;

/**
 * Milliseconds of a Go duration such as `1m30s`, `1.5h`, `250ms` or `0`; `undefined` for anything else, and for what
 * overflows Go's own range of 2^63 nanoseconds (about 292 years).
 */
export function parseDuration(text: string): number | undefined {
  if (text === "0" || text === "+0" || text === "-0") return 0;
  if (!WHOLE.test(text)) return undefined;
  let total = 0;
  for (const [, number, unit] of text.matchAll(PART)) total += Number(number) * UNITS_MS[unit];
  if (total * 1e6 >= 2 ** 63) return undefined;
  // What is less than a nanosecond is dropped, so that nothing above zero is printed as "0s".
  if (total * 1e6 < 1) return 0;
  return text.startsWith("-") ? -total : total;
}

/** A duration in milliseconds as Go prints it: `1m30s`, `5m0s`, `1h0m0s`, `250ms`, `0s`. */
export function formatDuration(ms: number): string {
  const rest = Number(Math.abs(ms).toFixed(6)); // to the nanosecond first, so that nothing is rounded up to "60s" later
  if (rest === 0) return "0s";
  const sign = ms < 0 ? "-" : "";
  if (rest < 1000) {
    if (rest >= 1) return `${sign}${trim(rest, 6)}ms`;
    return rest >= 1e-3 ? `${sign}${trim(rest * 1e3, 3)}µs` : `${sign}${Math.round(rest * 1e6)}ns`;
  }
  const hours = Math.floor(rest / 3_600_000);
  const minutes = Math.floor((rest % 3_600_000) / 60_000);
  const seconds = trim((rest % 60_000) / 1000, 9);
  return sign + (hours ? `${hours}h` : "") + (hours || minutes ? `${minutes}m` : "") + `${seconds}s`;
}

function trim(value: number, digits: number): string {
  return String(Number(value.toFixed(digits)));
}
