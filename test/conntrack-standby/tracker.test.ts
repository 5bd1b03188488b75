import assert from "node:assert/strict";
import { test } from "node:test";
import type { FlowKind } from "../../main.ts";
import { Tracker, type TrackerOptions } from "../../plugins/conntrack-standby/tracker.ts";
import { flow } from "./world.ts";

export const OPTIONS: TrackerOptions = {
  minAwake: 5_000,
  halfOpenMaxAge: 120_000,
  retryBackoff: 10_000,
  flap: { cycles: 0, window: 600_000, backoff: 60_000, backoffMax: 600_000 },
};

/** An instance that runs since 0 with an idle timeout of a minute. */
function tracker(options: Partial<TrackerOptions> = {}) {
  const epoch = { latest: 0, underWay: 0 };
  const made = new Tracker({ ...OPTIONS, ...options }, epoch);
  made.configure(60_000, () => true, 0);
  made.eligible = true;
  made.woke(0);
  const told = (kind: FlowKind, state: string, now: number, port = 1) =>
    made.event(kind, flow({ state, source_port: port }), now);
  return { made, epoch, told };
}

// I1, I2: only what is known to be over is over.
test("event() takes every state for live but NONE, TIME_WAIT and CLOSE", () => {
  const live = [
    "SYN_SENT",
    "SYN_RECV",
    "ESTABLISHED",
    "FIN_WAIT",
    "CLOSE_WAIT",
    "LAST_ACK",
    "SYN_SENT2",
    "UNKNOWN_12",
    "",
  ];
  for (const state of live) {
    const { told, made } = tracker();
    assert.equal(told("new", state, 1), "active", state);
    assert.equal(made.verdict(1e9, false), "active_inbound_connections", state);
  }
  for (const state of ["NONE", "TIME_WAIT", "CLOSE"]) {
    const { told, made } = tracker();
    assert.equal(told("new", state, 1), null, state);
    told("update", "ESTABLISHED", 2);
    assert.equal(told("update", state, 1_000), "idle", state);
    assert.equal(made.deadline(1_000), 61_000);
  }
});

// I2: a flow that was taken for gone comes back with the next word of it.
test("event() adds a live flow that is not known on an update", () => {
  const { told, made } = tracker();
  told("new", "SYN_SENT", 1);
  told("destroy", "", 2);
  assert.equal(told("update", "SYN_SENT2", 3), "active");
  assert.equal(made.connections, 1);
});

test("event() takes the source's port, address and protocol into account", () => {
  const { made } = tracker();
  const flows = [flow(), flow({ source_port: 2 }), flow({ source: "192.0.2.8" }), flow({ destination_port: 443 })];
  for (const each of [...flows, ...flows]) made.event("update", each, 1);
  made.event("update", flow({ protocol: "udp", state: "" }), 1);
  assert.equal(made.connections, 5);
  for (const each of flows) made.event("destroy", { ...each, state: "" }, 2);
  assert.equal(made.connections, 1);
});

// I26
test("expire() lets go of half-open flows by their first sight, and only of those", () => {
  const { made, told } = tracker();
  told("new", "SYN_SENT", 0);
  told("update", "SYN_RECV", 119_000);
  told("new", "SYN_SENT", 60_000, 2);
  told("new", "ESTABLISHED", 0, 3);
  assert.equal(made.expire(119_999), null);
  assert.equal(made.connections, 3);
  made.expire(120_000);
  assert.equal(made.connections, 2);
  told("update", "SYN_SENT", 130_000);
  made.sync([flow({ state: "SYN_SENT", source_port: 1 }), flow({ source_port: 3 })], 1, 131_000);
  assert.equal(made.connections, 1, "tried again and seen again it is as old as it was");
  told("update", "ESTABLISHED", 140_000);
  assert.equal(made.connections, 2, "answered, it is a connection");
});

test("expire() counts a half-open flow from now when the clock has stepped back", () => {
  const { made, told } = tracker();
  told("new", "SYN_SENT", 1_000_000);
  made.expire(0);
  made.expire(119_999);
  assert.equal(made.connections, 1);
  assert.equal(made.expire(120_000), "idle");
});

// I13 (b), (c): a dump does not undo what was heard while it was made.
test("sync() believes events that came after the dump began", () => {
  const { made, told, epoch } = tracker();
  told("new", "ESTABLISHED", 1, 1);
  const shown = [flow({ source_port: 1 })];
  epoch.latest = 1;
  epoch.underWay = 1;
  told("destroy", "", 2, 1);
  told("new", "ESTABLISHED", 3, 2);
  assert.equal(made.sync(shown, 1, 4), null);
  assert.equal(made.connections, 1);
  told("new", "ESTABLISHED", 4, 3);
  made.sync([flow({ source_port: 2 }), flow({ source_port: 3, state: "SYN_SENT" })], 1, 4);
  made.expire(1e9);
  assert.equal(made.connections, 2, "answered since");
  epoch.latest = 2;
  assert.equal(made.sync([], 2, 5), "idle", "the next one shows that it is gone");
});

// I15-like: what a stop ends does not count after the next start.
test("left() makes what was connected before a stop count no more", () => {
  const { made, told } = tracker();
  told("new", "ESTABLISHED", 1);
  made.left("stopped");
  made.woke(10);
  assert.equal(made.connections, 0);
  made.sync([flow({ source_port: 1 })], 1, 20);
  assert.equal(made.connections, 0, "it stands in the table for days");
  told("update", "FIN_WAIT", 30);
  assert.equal(made.connections, 1);
});

// I19
test("deadline() is the latest of idle timeout, hold, minimum awake time and back-off", () => {
  const { made, told } = tracker({ minAwake: 100_000 });
  assert.equal(made.deadline(0), 100_000);
  told("new", "ESTABLISHED", 50_000);
  assert.equal(made.deadline(50_000), null);
  told("destroy", "", 70_000);
  assert.equal(made.deadline(70_000), 130_000);
  made.hold(300_000, 70_000);
  assert.equal(made.deadline(70_000), 370_000);
  made.hold(90_000, 70_000);
  assert.equal(made.deadline(70_000), 160_000);
  made.release();
  made.refuse({ kind: "vetoed", plugin: "p", code: "c", message: "m", at: 130_000 });
  assert.equal(made.deadline(130_000), 140_000);
  made.eligible = false;
  assert.equal(made.deadline(130_000), null);
});

// I6
test("deadline() is never further away than the policy says when the clock steps back", () => {
  const { made, told } = tracker();
  made.hold(90_000, 1e9);
  made.woke(1e9);
  told("new", "ESTABLISHED", 1e9);
  told("destroy", "", 1e9);
  assert.equal(made.deadline(1_000), 91_000);
  assert.equal(made.idleSince(1_000), 1_000);
  assert.equal(made.verdict(90_999, false), "idle_timeout_not_elapsed");
  assert.equal(made.verdict(91_000, false), "ready_for_standby");
});

// I4, I11
test("advance() refuses an attempt that anything came in between of", () => {
  const overtakers = {
    activity: (
      { told }: ReturnType<typeof tracker>,
    ) => (told("new", "ESTABLISHED", 60_000), told("destroy", "", 60_000)),
    hold: ({ made }: ReturnType<typeof tracker>) => made.hold(1, 60_000),
    policy: ({ made }: ReturnType<typeof tracker>) => made.configure(60_000, () => true, 60_000),
    state: ({ made }: ReturnType<typeof tracker>) => made.overtake("state"),
  };
  for (const [name, overtake] of Object.entries(overtakers)) {
    const fixture = tracker();
    assert.equal(fixture.made.request(59_999, false), false);
    assert.equal(fixture.made.request(60_000, true), false, "blind");
    assert.equal(fixture.made.request(60_000, false), true);
    assert.equal(fixture.made.request(60_000, false), false, "once");
    assert.equal(fixture.made.advance(fixture.made.attempt!, "asked", 60_000, false), null);
    overtake(fixture);
    assert.equal(fixture.made.advance(fixture.made.attempt!, "committed", 200_000, false), name);
  }
});

test("refuse() waits longer with each failure in a row, and as long as ever after a refusal", () => {
  const { made } = tracker();
  const waits = (["failed", "failed", "failed", "vetoed", "failed"] as const).map((kind) => {
    made.refuse({ kind, plugin: null, code: null, message: "", at: 1e6 });
    return made.deadline(1e6)! - 1e6;
  });
  assert.deepEqual(waits, [10_000, 20_000, 40_000, 10_000, 10_000]);
});

test("excuse() counts what could not be seen as not idle", () => {
  const { made } = tracker();
  made.excuse(30_000, 100_000);
  assert.equal(made.deadline(100_000), 90_000);
  made.excuse(1e9, 100_000);
  assert.equal(made.deadline(100_000), 160_000);
});

// A mark that changes on a flow in TIME_WAIT is told without a state, and is no life.
test("event() leaves the state as it was on an update of TCP that has none", () => {
  const { told, made } = tracker();
  told("new", "ESTABLISHED", 1);
  told("update", "", 2);
  assert.equal(made.connections, 1);
  told("update", "TIME_WAIT", 3);
  told("update", "", 4);
  assert.equal(made.connections, 0);
});
