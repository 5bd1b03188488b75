import assert from "node:assert/strict";
import { test } from "node:test";
import { gate, ORIGIN, registryHost, ScriptedDriver } from "./scripted.ts";

const BODY = { name: "web", image: "any" };
const LONG = { timeout: 900_000 };

// S3: the waiter is in place before the state is checked.
test("wait() resolves at once for a state that is reached, and for one that cannot be", async (t) => {
  const { hypervisor } = await registryHost(t);
  const { id } = await hypervisor.create(BODY, ORIGIN);
  assert.deepEqual(await hypervisor.wait(id, "Running", LONG), {
    state: "Running",
    state_error: null,
    timed_out: false,
  });
  await hypervisor.stop(id, ORIGIN);
  assert.deepEqual(await hypervisor.wait(id, "Running", LONG), {
    state: "Stopped",
    state_error: null,
    timed_out: false,
  });
});

test("wait() sees a state that lasts for a moment only", async (t) => {
  const { hypervisor, driver } = await registryHost(t);
  const { id } = await hypervisor.create(BODY, ORIGIN);
  const slow = gate();
  driver.script.standby = slow.script;
  const paused = hypervisor.wait(id, "Paused", LONG);
  const asleep = hypervisor.wait(id, "Standby", LONG);
  const sleeping = hypervisor.standby(id, ORIGIN);
  await slow.arrived;
  slow.open();
  assert.equal((await paused).state, "Paused");
  assert.equal((await asleep).state, "Standby");
  await sleeping;
});

test("wait() goes on while what was asked leads to the target", async (t) => {
  const { hypervisor, driver } = await registryHost(t);
  const { id } = await hypervisor.create(BODY, ORIGIN);
  await hypervisor.standby(id, ORIGIN);
  const slow = gate();
  driver.script.restore = slow.script;
  const restoring = hypervisor.restore(id, ORIGIN);
  const waiting = hypervisor.wait(id, "Running", LONG);
  await slow.arrived;
  slow.open();
  assert.equal((await waiting).state, "Running");
  await restoring;
});

test("wait() times out with the state of the moment", async (t) => {
  const { hypervisor } = await registryHost(t);
  const { id } = await hypervisor.create(BODY, ORIGIN);
  assert.deepEqual(await hypervisor.wait(id, "Standby", { timeout: 1 }), {
    state: "Running",
    state_error: null,
    timed_out: true,
  });
});

test("wait() ends with not_found when the instance is deleted, and as at a timeout when the client leaves", async (t) => {
  const { hypervisor } = await registryHost(t);
  const { id } = await hypervisor.create(BODY, ORIGIN);
  const client = new AbortController();
  const left = hypervisor.wait(id, "Stopped", { ...LONG, signal: client.signal });
  client.abort();
  assert.equal((await left).timed_out, true);
  const gone = assert.rejects(hypervisor.wait(id, "Paused", LONG), { code: "not_found" });
  await hypervisor.delete(id, ORIGIN);
  await gone;
  await assert.rejects(hypervisor.wait(id, "Paused", LONG), { code: "not_found" });
});

test("wait() learns what no driver reported by asking after 5 s", async (t) => {
  t.mock.timers.enable({ apis: ["setInterval"] });
  t.after(() => t.mock.timers.reset());
  const driver = new ScriptedDriver();
  driver.ready = "Initializing";
  const { hypervisor } = await registryHost(t, { driver });
  const { id } = await hypervisor.create(BODY, ORIGIN);
  const waiting = hypervisor.wait(id, "Running", LONG);
  driver.machines.set(id, { state: "Running" });
  t.mock.timers.tick(5_000);
  assert.equal((await waiting).state, "Running");
});
