/** Expiry, waiting, rows of before, and the closing of the registry. */
import assert from "node:assert/strict";
import { join } from "node:path";
import { DatabaseSync } from "node:sqlite";
import { test, type TestContext } from "node:test";
import { definePlugin, type Plugin, Veto } from "../../main.ts";
import { capturedLogs, temporaryFolder } from "../helpers.ts";
import { gate, ORIGIN, registryHost, ScriptedDriver } from "./scripted.ts";

const BODY = { name: "web", image: "any" };
const LONG = { timeout: 900_000 };
const HOUR = 3_600_000;
const asleep = { state: "Standby", state_error: null, timed_out: false } as const;

test("wait() ends when what led to the target fails", async (t) => {
  const { hypervisor, driver } = await registryHost(t);
  const { id } = await hypervisor.create(BODY, ORIGIN);
  await hypervisor.standby(id, ORIGIN);
  const [arrived, passage] = [Promise.withResolvers<void>(), Promise.withResolvers<never>()];
  driver.script.restore = () => {
    arrived.resolve();
    return passage.promise;
  };
  const restoring = assert.rejects(hypervisor.restore(id, ORIGIN), { code: "driver_failed" });
  await arrived.promise;
  const waiting = hypervisor.wait(id, "Running", LONG);
  passage.reject(new Error("bad memory"));
  assert.deepEqual(await waiting, asleep);
  await restoring;
});

test("wait() ends when what led to the target is refused, of which no event tells", async (t) => {
  const arrived = Promise.withResolvers<void>();
  const passage = Promise.withResolvers<void>();
  const strict = definePlugin({
    name: "strict",
    setup(host) {
      host.hooks.guard("before:restore", async () => {
        arrived.resolve();
        await passage.promise;
        throw new Veto("not_now", "the night is young");
      });
    },
  });
  const { hypervisor } = await registryHost(t, { plugins: [strict as Plugin] });
  const { id } = await hypervisor.create(BODY, ORIGIN);
  await hypervisor.standby(id, ORIGIN);
  const restoring = assert.rejects(hypervisor.restore(id, ORIGIN), { code: "vetoed" });
  await arrived.promise;
  const waiting = hypervisor.wait(id, "Running", LONG);
  passage.resolve();
  assert.deepEqual(await waiting, asleep);
  await restoring;
});

test("wait() ends as at its timeout when the host closes, however long it was to be", async (t) => {
  const { hypervisor, host } = await registryHost(t);
  const { id } = await hypervisor.create(BODY, ORIGIN);
  const waiting = ["Stopped", "Standby"] as const;
  const results = waiting.map((target) => hypervisor.wait(id, target, { timeout: Infinity }));
  await host.close();
  for (const result of await Promise.all(results)) {
    assert.deepEqual([result.state, result.timed_out], ["Running", true]);
  }
});

test("an instance that is made while the host closes leaves no timer behind", async (t) => {
  t.mock.timers.enable({ apis: ["setTimeout"] });
  t.after(() => t.mock.timers.reset());
  const logs = capturedLogs(t);
  const { hypervisor, host, driver } = await registryHost(t);
  const slow = gate();
  driver.script.start = slow.script;
  const creating = hypervisor.create({ ...BODY, ttl: "1ms" }, ORIGIN);
  await slow.arrived;
  const closing = host.close();
  await new Promise(setImmediate);
  slow.open();
  await creating;
  await closing;
  t.mock.timers.tick(600_000);
  await new Promise(setImmediate);
  assert.deepEqual(logs.filter((line) => /expired/.test(line)), []);
});

// S7: what counts is when a request came, not when its turn did; S13: an expiry is there from the row's first moment.
test("an update that was asked before the expiry prolongs it, though its turn comes after", async (t) => {
  const begin = mockDate(t);
  const { hypervisor, driver, event } = await registryHost(t);
  const { id } = await hypervisor.create({ ...BODY, ttl: "1h" }, ORIGIN);
  const { instance } = await event(({ action }) => action === "create");
  assert.equal(instance.expires_at, begin + HOUR);
  const slow = gate();
  driver.script.standby = slow.script;
  const sleeping = hypervisor.standby(id, ORIGIN);
  await slow.arrived;
  t.mock.timers.setTime(begin + HOUR - 1);
  const prolonging = hypervisor.update(id, { ttl: "1h" }, ORIGIN);
  t.mock.timers.setTime(begin + HOUR + 1);
  slow.open();
  await sleeping;
  assert.equal((await prolonging).expires_at, begin + 2 * HOUR - 1);
});

test("update() of an expiry that is over is refused, and of anything else is not", async (t) => {
  const begin = mockDate(t);
  const { hypervisor } = await registryHost(t);
  const { id } = await hypervisor.create({ ...BODY, ttl: "1h" }, ORIGIN);
  t.mock.timers.setTime(begin + HOUR + 1500);
  await assert.rejects(hypervisor.update(id, { ttl: "1h" }, ORIGIN), {
    code: "instance_expired",
    message: 'Cannot update expiry of instance "web": expired 1.5s ago',
  });
  assert.deepEqual((await hypervisor.update(id, { tags: { a: "b" } }, ORIGIN)).tags, { a: "b" });
});

test("deletions of many that expire at once are bounded, and all are carried out", async (t) => {
  const folder = temporaryFolder(t);
  const first = await registryHost(t, { folder });
  for (let n = 0; n < 40; n++) await first.hypervisor.create({ ...BODY, name: `w${n}`, ttl: "1h" }, ORIGIN);
  await first.host.close();
  mockDate(t, Date.now() + 2 * HOUR);
  const driver = new ScriptedDriver(first.driver.machines);
  let [now, most] = [0, 0];
  driver.script.delete = async () => {
    most = Math.max(most, ++now);
    await new Promise(setImmediate);
    now--;
  };
  const { hypervisor, event } = await registryHost(t, { folder, driver });
  const last = first.hypervisor.find(first.hypervisor.list().at(-1)!.id)!;
  await event(({ action, instance_id }) => action === "delete" && instance_id === last.id);
  assert.deepEqual(hypervisor.list(), []);
  assert.ok(most <= 16, `${most} at once`);
});

test("update() that changes nothing returns the instance and emits nothing", async (t) => {
  const { hypervisor, host, events } = await registryHost(t);
  const { id } = await hypervisor.create({ ...BODY, tags: { a: "b" } }, ORIGIN);
  const before = hypervisor.find(id);
  for (const body of [{}, { tags: { a: "b" } }, { env: {} }, { expires_at: null }]) {
    assert.equal(await hypervisor.update(id, body, ORIGIN), before);
  }
  await host.close();
  assert.deepEqual(events.map(({ action }) => action), ["create", "start"]);
});

test("changed() a thousand times looks a few times only", async (t) => {
  const { hypervisor, driver } = await registryHost(t);
  const { id } = await hypervisor.create(BODY, ORIGIN);
  let looks = 0;
  driver.script.inspect = () => void looks++;
  for (let n = 0; n < 1000; n++) hypervisor.changed(id, "storm");
  await hypervisor.stop(id, ORIGIN);
  assert.equal(looks, 2);
});

// S14: a sleep is something that happened, not a state to return to.
test("what woke by itself stays awake", async (t) => {
  const { hypervisor, driver, event } = await registryHost(t, { table: { reconcile_interval: "100ms" } });
  const { id } = await hypervisor.create(BODY, ORIGIN);
  await hypervisor.standby(id, ORIGIN);
  driver.machines.set(id, { state: "Running" });
  hypervisor.changed(id, "traffic");
  await event(({ cause, to }) => cause === "traffic" && to === "Running");
  let looks = 0;
  const twice = Promise.withResolvers<void>();
  driver.script.inspect = () => void (++looks === 2 && twice.resolve());
  await twice.promise;
  assert.deepEqual([hypervisor.find(id)?.state, driver.calls.filter((call) => call === "standby").length], [
    "Running",
    1,
  ]);
});

test("a start that was interrupted and succeeded has forgotten how the run before it ended", async (t) => {
  const { hypervisor, driver, event } = await registryHost(t);
  const { id } = await hypervisor.create(BODY, ORIGIN);
  driver.machines.set(id, { state: "Stopped", exit_code: 3, exit_message: "exited with code 3" });
  hypervisor.changed(id, "exit");
  await event(({ to }) => to === "Stopped");
  const { start } = driver;
  driver.start = async (instance, signal) => {
    await start(instance, signal);
    throw new Error("lost the connection");
  };
  await assert.rejects(hypervisor.start(id, ORIGIN), { code: "driver_failed" });
  const { state, exit_code, exit_message, stopped_at } = hypervisor.find(id)!;
  assert.deepEqual([state, exit_code, exit_message, stopped_at], ["Running", null, null, null]);
});

function mockDate(t: TestContext, now = Date.now()): number {
  t.mock.timers.enable({ apis: ["Date"], now });
  t.after(() => t.mock.timers.reset());
  return now;
}

/** Changes the rows that a closed host left. */
function edit(folder: string, sql: string): void {
  const db = new DatabaseSync(join(folder, "data", "dormouse.db"));
  db.exec(sql);
  db.close();
}

test("a row of an older version has what it lacks filled in", async (t) => {
  const folder = temporaryFolder(t);
  const first = await registryHost(t, { folder });
  const { id } = await first.hypervisor.create(BODY, ORIGIN);
  await first.host.close();
  edit(
    folder,
    `UPDATE instances SET body = json_remove(body, '$.hints', '$.tags', '$.policies', '$.network.mac', '$.phases', '$.expires_at', '$.vcpus')`,
  );
  const { hypervisor } = await registryHost(t, { folder, driver: new ScriptedDriver(first.driver.machines) });
  const { hints, tags, policies, network, phases, expires_at, vcpus, created_at } = hypervisor.find(id)!;
  assert.deepEqual({ hints, tags, policies, expires_at, vcpus }, {
    hints: {},
    tags: {},
    policies: {},
    expires_at: null,
    vcpus: null,
  });
  assert.equal(network.mac, null);
  assert.deepEqual(phases, { since: created_at, totals: {} });
  assert.equal(JSON.parse(hypervisor.presentJson(hypervisor.find(id)!)).state, "Running");
  assert.equal((await hypervisor.standby(id, ORIGIN)).state, "Standby");
});

test("a row that is no JSON ends the start with the instance's id", async (t) => {
  const folder = temporaryFolder(t);
  const first = await registryHost(t, { folder });
  const { id } = await first.hypervisor.create(BODY, ORIGIN);
  await first.host.close();
  edit(folder, `UPDATE instances SET body = '{"name":'`);
  await assert.rejects(registryHost(t, { folder }), {
    code: "plugin_failed",
    message: new RegExp(`^Cannot set up plugin "hypervisor": Cannot read the row of instance "${id}": `),
  });
});
