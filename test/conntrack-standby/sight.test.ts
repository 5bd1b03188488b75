import assert from "node:assert/strict";
import { test } from "node:test";
import { capturedLogs } from "../helpers.ts";
import { settle } from "../clock.ts";
import { flow, world } from "./world.ts";

// I3: an event that was lost without a word is made up for by the dump before the sleep.
test("an instance does not sleep when the dump shows a connection that no event told of", async (t) => {
  const { instance, clock, kernel, state, said } = await world(t);
  const { id } = await instance();
  kernel.deaf = true;
  kernel.set(flow());
  kernel.deaf = false;
  await clock.pass(60_000);
  assert.equal(state(id), "Running");
  assert.deepEqual(said(), ["requested ready_for_standby", "cancelled activity"]);
  kernel.deaf = true;
  kernel.destroy(flow());
  await clock.pass(2_000 + 10_000);
  assert.equal(state(id), "Standby", "the reconcile finds the end that no event told of");
});

// I3, I5, I12, I27: nothing sleeps from a loss to the dump after it, which is tried until it works.
test("nothing sleeps while connections may be missed", async (t) => {
  const logs = capturedLogs(t);
  const { instance, clock, kernel, state } = await world(t);
  const { id } = await instance();
  kernel.lose();
  await clock.pass(60_000);
  assert.equal(state(id), "Running");
  let failures = 3;
  kernel.duringDump = () => {
    if (failures-- > 0) throw new Error("no answer");
  };
  kernel.connect();
  await clock.pass(500 + 1_000 + 2_000);
  assert.equal(failures, -1);
  await clock.pass(9_999);
  assert.equal(state(id), "Running", "what could not be seen does not count as idle");
  await clock.pass(60_000);
  assert.equal(state(id), "Standby");
  assert.ok(logs.some((line) => line.includes("nothing sleeps: overflow")));
});

// I5: what is lost while the dump after a loss is made needs another one.
test("a loss in the middle of the dump after a loss has the table dumped again", async (t) => {
  const { instance, clock, kernel, state } = await world(t);
  const { id } = await instance();
  kernel.lose();
  const { dumps } = kernel;
  kernel.duringDump = () => {
    kernel.duringDump = undefined;
    kernel.lose();
    kernel.connect();
  };
  kernel.connect();
  await settle();
  assert.equal(kernel.dumps, dumps + 2);
  await clock.pass(10_000);
  assert.equal(state(id), "Standby");
});

// I3: a failed dump is a busy instance.
test("an instance does not sleep when the table cannot be read", async (t) => {
  const { instance, clock, kernel, state, said } = await world(t);
  const { id } = await instance();
  kernel.duringDump = () => {
    throw new Error("no answer");
  };
  await clock.pass(30_000);
  assert.equal(state(id), "Running");
  assert.deepEqual(said().slice(0, 2), ["requested ready_for_standby", "failed observer_error"]);
  kernel.duringDump = undefined;
  await clock.pass(60_000);
  assert.equal(state(id), "Standby");
});

// I3: what nothing has told of is found by the full sync, long before a sleep would ask.
test("the full sync finds connections that no event told of, and the reconcile serves all with one dump", async (t) => {
  const { instance, clock, kernel, decisions } = await world(t, {
    table: { full_sync: "1m", reconcile_interval: "2s" },
  });
  for (const name of ["a", "b", "c"]) await instance(name, { enabled: true, idle_timeout: "10m" });
  kernel.deaf = true;
  for (const destination of ["10.88.0.2", "10.88.0.3", "10.88.0.4"]) kernel.set(flow({ destination }));
  const { dumps } = kernel;
  await clock.pass(59_999);
  assert.equal(kernel.dumps, dumps, "nobody is connected as far as is known");
  await clock.pass(1);
  assert.equal(kernel.dumps, dumps + 1);
  await clock.pass(20_000);
  assert.equal(kernel.dumps, dumps + 11);
  await clock.pass(3_600_000);
  assert.deepEqual(decisions, []);
});
