import assert from "node:assert/strict";
import { it } from "node:test";
import fc from "fast-check";
import { formatDuration, parseDuration } from "../../plugins/shared/duration.ts";

// What Go's time.ParseDuration accepts, and its value in milliseconds.
const GOOD: [string, number][] = [
  ["0", 0],
  ["+0", 0],
  ["-0", 0],
  ["0s", 0],
  ["5s", 5000],
  ["+5s", 5000],
  ["-5s", -5000],
  ["1478s", 1_478_000],
  ["5.0s", 5000],
  ["5.6s", 5600],
  ["5.s", 5000],
  [".5s", 500],
  ["-.5s", -500],
  ["1.004s", 1004],
  ["100.00100s", 100_001],
  ["10ns", 1e-5],
  ["0.1ns", 0],
  ["11us", 0.011],
  ["12µs", 0.012],
  ["12μs", 0.012],
  ["13ms", 13],
  ["15m", 900_000],
  ["16h", 57_600_000],
  ["3h30m", 12_600_000],
  ["4m10.5s", 250_500],
  ["10.5s4m", 250_500],
  ["1s1s", 2000],
  ["1h2m3s4ms5us6ns", 3_723_004.005006],
  ["39h9m14.425s", 140_954_425],
  ["9223372036s", 9_223_372_036_000],
  ["0.3333333333333333333h", 1_200_000],
];
const BAD = [
  "",
  " ",
  "3",
  "-",
  "s",
  ".",
  "-.",
  ".s",
  "+.s",
  "1d",
  "1w",
  "1S",
  "1 s",
  " 1s",
  "1s ",
  "1,5s",
  "1e3s",
  "--5s",
  "5s-3s",
  "0x10s",
  "1.2.3s",
  "∞",
  "NaN",
  "Infinity",
  "1sec",
  "1h2",
  "9223372037s",
  "3000000h",
  "-9223372037s",
  "9".repeat(400) + "h",
  "١s",
  "0.0",
  "1s\n",
];

it("parseDuration() reads what Go reads", () => {
  for (const [text, ms] of GOOD) {
    const parsed = parseDuration(text);
    assert.ok(parsed !== undefined && Math.abs(parsed - ms) < 1e-6, `${text}: ${parsed}`);
  }
});

it("parseDuration() refuses what Go refuses", () => {
  for (const text of BAD) assert.equal(parseDuration(text), undefined, JSON.stringify(text.slice(0, 20)));
});

it("formatDuration() prints as Go does", () => {
  const cases: [number, string][] = [
    [0, "0s"],
    [-0, "0s"],
    [1e-6, "1ns"],
    [0.0011, "1.1µs"],
    [0.5, "500µs"],
    [2.2, "2.2ms"],
    [999, "999ms"],
    [1000, "1s"],
    [3300, "3.3s"],
    [60_000, "1m0s"],
    [245_000, "4m5s"],
    [245_001, "4m5.001s"],
    [300_000, "5m0s"],
    [3_600_000, "1h0m0s"],
    [18_367_001, "5h6m7.001s"],
    [-90_000, "-1m30s"],
    [999.9999999, "1s"],
    [59_999.9999999, "1m0s"],
    [0.9999999, "1ms"],
    [3_599_999.9999999, "1h0m0s"],
  ];
  for (const [ms, text] of cases) assert.equal(formatDuration(ms), text, String(ms));
});

it("parseDuration() gives back what formatDuration() printed", () => {
  const whole = fc.integer({ min: -9_223_372_036_000, max: 9_223_372_036_000 });
  fc.assert(fc.property(whole, (ms) => assert.equal(parseDuration(formatDuration(ms)), ms)), { numRuns: 2000 });
  // Down to the nanosecond, over the range in which a double still holds one.
  const nanoseconds = fc.integer({ min: -1e15, max: 1e15 });
  fc.assert(
    fc.property(nanoseconds, (ns) => {
      const text = formatDuration(ns / 1e6);
      assert.equal(Math.round(parseDuration(text)! * 1e6), ns, text);
      assert.equal(formatDuration(parseDuration(text)!), text);
    }),
    { numRuns: 2000 },
  );
});

it("parseDuration() takes a bounded time when the text is hostile", () => {
  for (const text of ["1".repeat(100_000) + "x", "1s".repeat(50_000) + "!", "1.".repeat(50_000), ".".repeat(100_000)]) {
    assert.equal(parseDuration(text), undefined);
  }
});
