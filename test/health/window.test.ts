import assert from "node:assert/strict";
import { describe, it } from "node:test";
import * as fc from "fast-check";
import type { Instance, State } from "../../main.ts";
import { type Check, checkOf } from "../../plugins/health/policy.ts";
import { counted, cut, delayOf, fresh, statusOf, type Window } from "../../plugins/health/window.ts";

function check(changes: { start_period?: string; failures?: number; successes?: number } = {}): Check {
  const { start_period = "0s", failures = 3, successes = 1 } = changes;
  const thresholds = { failure_threshold: failures, success_threshold: successes };
  return checkOf({ type: "tcp", interval: "10s", timeout: "2s", start_period, ...thresholds, tcp: { port: 1 } })!;
}

/** The statuses after each result; results come one second after the other. */
function statuses(results: string, using = check(), begin = fresh(0)): string {
  let window: Window = begin;
  return [...results].map((result, i) => {
    window = counted(window, using, result === "+" ? null : "broken", (i + 1) * 1_000);
    return window.status[0];
  }).join("");
}

describe("counted()", () => {
  it("is healthy at the threshold of successes, unhealthy at that of failures", () => {
    assert.equal(statuses("+"), "h");
    assert.equal(statuses("+--+---"), "hhhhhhu");
    assert.equal(statuses("---+"), "ssuh");
    assert.equal(statuses("++-++++", check({ successes: 3 })), "ssssshh");
    assert.equal(statuses("-+-+-", check({ failures: 1, successes: 2 })), "uuuuu");
  });

  it("counts the failures of the start period and acts on them with the first after it", () => {
    assert.equal(statuses("-----", check({ start_period: "5s" })), "ssssu");
    assert.equal(statuses("--+---", check({ start_period: "3s" })), "sshhhu", "healthy within it");
    assert.equal(statuses("+---+", check({ start_period: "1h" })), "hhhhh");
  });

  it("remembers when, and clears the error with a success", () => {
    const failed = counted(fresh(0), check(), "broken", 1_000);
    assert.deepEqual([failed.failures, failed.failed_at, failed.error], [1, 1_000, "broken"]);
    const well = counted(failed, check(), null, 2_000);
    const { failures, successes, checked_at, succeeded_at, failed_at, error } = well;
    assert.deepEqual([failures, successes, checked_at, succeeded_at, failed_at, error], [
      0,
      1,
      2_000,
      2_000,
      1_000,
      null,
    ]);
  });

  it("does not make the start period longer when the clock steps back", () => {
    const using = check({ start_period: "5s", failures: 1 });
    let window = fresh(1_000_000);
    for (let second = 0; second <= 5; second++) window = counted(window, using, "broken", second * 1_000);
    assert.equal(window.status, "unhealthy");
  });
});

describe("statusOf()", () => {
  it("is that of the window only while it runs", () => {
    const healthy = counted(fresh(0), check(), null, 1);
    const cases: [State, Instance["transition"], Window | null, string][] = [
      ["Running", null, healthy, "healthy"],
      ["Running", null, null, "starting"],
      ["Running", null, { ...healthy, over: true }, "starting"],
      ["Initializing", null, healthy, "starting"],
      ["Created", "start", healthy, "unknown"],
      ["Paused", null, healthy, "unknown"],
      ["Paused", "standby", healthy, "unknown"],
      ["Standby", null, healthy, "unknown"],
      ["Shutdown", "stop", healthy, "unknown"],
      ["Stopped", null, healthy, "unknown"],
      ["Unknown", null, healthy, "unknown"],
    ];
    for (const [state, transition, window, expected] of cases) {
      const instance = { state, transition } as Instance;
      assert.equal(statusOf(instance, true, window), expected, `${state} ${transition}`);
      assert.equal(statusOf(instance, false, window), "disabled");
    }
  });
});

describe("delayOf()", () => {
  it("spreads what is due at once, and goes on with what is counting down", () => {
    const checked = { ...fresh(0), checked_at: 60_000 };
    assert.equal(delayOf(fresh(0), check(), 0, 0.5), 500);
    assert.equal(delayOf(checked, check(), 64_000, 0.5), 6_000);
    assert.equal(delayOf(checked, check(), 90_000, 0.25), 250);
    assert.equal(delayOf(checked, check(), 1_000, 0.5), 10_000, "the clock stepped back");
    const often = { ...check(), interval: 200 };
    assert.equal(delayOf(fresh(0), often, 0, 0.5), 100);
  });
});

describe("cut()", () => {
  it("keeps 512 bytes of UTF-8 in whole code points", () => {
    assert.equal(cut("short"), "short");
    assert.equal(cut("x".repeat(600)), "x".repeat(512));
    assert.equal(cut("é".repeat(600)), "é".repeat(256));
    assert.equal(cut("x" + "€".repeat(600)), "x" + "€".repeat(170));
    assert.equal(cut("😀".repeat(600)), "😀".repeat(128));
    assert.equal(cut("xyz" + "😀".repeat(600)), "xyz" + "😀".repeat(127));
  });

  it("keeps a beginning that is never too long and never broken, whatever the text", () => {
    fc.assert(fc.property(fc.string({ unit: "binary", maxLength: 700 }), (text) => {
      const kept = cut(text);
      const bytes = new TextEncoder().encode(kept);
      assert.ok(bytes.length <= 512 && text.startsWith(kept) && kept.isWellFormed());
      assert.ok(kept === text || bytes.length > 508);
    }));
  });
});
