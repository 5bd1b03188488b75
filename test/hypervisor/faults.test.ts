/** What the registry makes of drivers, guards and disks that fail, hang or lie. */
import assert from "node:assert/strict";
import { test, type TestContext } from "node:test";
import { definePlugin, DormouseError, type Plugin } from "../../main.ts";
import { capturedLogs, temporaryFolder } from "../helpers.ts";
import { gate, ORIGIN, registryHost, ScriptedDriver } from "./scripted.ts";

const BODY = { name: "web", image: "any" };

/** A plugin whose commit hook fails from the `n`th change on while `broken` is set, as a full disk does. */
function fullDisk(): { plugin: Plugin; state: { broken: boolean } } {
  const state = { broken: false };
  const plugin = definePlugin({
    name: "disk",
    setup(host) {
      host.hooks.commit("instance:commit", () => {
        if (state.broken) throw new Error("database or disk is full");
      });
    },
  });
  return { plugin: plugin as Plugin, state };
}

function mockTimeouts(t: TestContext): void {
  t.mock.timers.enable({ apis: ["setTimeout"] });
  t.after(() => t.mock.timers.reset());
}

test("create() that fails on a full disk leaves nothing once there is room again", async (t) => {
  const { plugin, state } = fullDisk();
  const table = { reconcile_interval: "100ms" };
  const { hypervisor, driver, event } = await registryHost(t, { plugins: [plugin], table });
  driver.script.start = () => void (state.broken = true);
  await assert.rejects(hypervisor.create(BODY, ORIGIN), /disk is full/);
  const [half] = hypervisor.list();
  await assert.rejects(hypervisor.start(half.id, ORIGIN), { code: "invalid_state", message: /it is being removed/ });
  state.broken = false;
  await event(({ action, instance_id }) => action === "delete" && instance_id === half.id);
  assert.equal(driver.machines.size, 0);
  delete driver.script.start;
  assert.equal((await hypervisor.create(BODY, ORIGIN)).state, "Running");
});

test("create() tells why it failed also when what is left cannot be removed yet", async (t) => {
  const { hypervisor, driver } = await registryHost(t);
  driver.script.start = () => Promise.reject(new Error("no such program"));
  driver.script.delete = () => Promise.reject(new Error("busy mount"));
  await assert.rejects(hypervisor.create(BODY, ORIGIN), {
    code: "driver_failed",
    message: /^Cannot create instance "web": no such program; .*busy mount$/,
  });
});

test("an action on an instance that is half removed is refused, and its deletion is not forgotten", async (t) => {
  const { hypervisor, driver } = await registryHost(t);
  for (const stopped of [false, true]) {
    const { id } = await hypervisor.create(BODY, ORIGIN);
    if (stopped) await hypervisor.stop(id, ORIGIN);
    driver.script.delete = () => Promise.reject(new Error("busy mount"));
    await assert.rejects(hypervisor.delete(id, ORIGIN), { code: "driver_failed" });
    for (const action of ["start", "stop", "restore"] as const) {
      await assert.rejects(hypervisor[action](id, ORIGIN), { code: "invalid_state" }, action);
    }
    await assert.rejects(hypervisor.fork(id, { name: "copy" }, ORIGIN), { code: "invalid_state" });
    assert.equal(hypervisor.find(id)?.transition, "delete");
    delete driver.script.delete;
    await hypervisor.delete(id, ORIGIN);
    assert.deepEqual(hypervisor.list(), []);
  }
});

test("a driver that breaks while it validates fails the action like any other", async (t) => {
  const { hypervisor, driver } = await registryHost(t);
  const { id } = await hypervisor.create(BODY, ORIGIN);
  await hypervisor.stop(id, ORIGIN);
  driver.script.validate = () => Promise.reject(new Error("no clay"));
  await assert.rejects(hypervisor.start(id, ORIGIN, { cmd: ["x"] }), {
    code: "driver_failed",
    message: 'Cannot start instance "web": no clay',
  });
  assert.equal(hypervisor.find(id)?.state, "Stopped");
});

test("update() refuses an env with which the driver could not run it, and asks it of nothing else", async (t) => {
  const { hypervisor, driver } = await registryHost(t);
  const { id } = await hypervisor.create(BODY, ORIGIN);
  driver.script.validate = ({ env }) => {
    if (env.CLAY === "none") throw new DormouseError("invalid_request", "No clay");
  };
  driver.calls.length = 0;
  await assert.rejects(hypervisor.update(id, { env: { CLAY: "none" } }, ORIGIN), { code: "invalid_request" });
  assert.deepEqual(hypervisor.find(id)?.env, {});
  await hypervisor.update(id, { env: { CLAY: "red" } }, ORIGIN);
  assert.deepEqual(hypervisor.find(id)?.env, { CLAY: "red" });
  await hypervisor.update(id, { tags: { a: "b" } }, ORIGIN);
  assert.deepEqual(driver.calls, ["validate", "validate", "validate"]);
  // What keeps it from running anyway is no reason.
  driver.script.validate = () => Promise.reject(new Error("no clay at all"));
  await hypervisor.update(id, { env: { CLAY: "none" } }, ORIGIN);
  assert.deepEqual(hypervisor.find(id)?.env, { CLAY: "none" });
});

test("a standby that its driver finishes after all is one, and the restore behind it wakes it", async (t) => {
  const { hypervisor, driver } = await registryHost(t);
  const { id } = await hypervisor.create(BODY, ORIGIN);
  const [arrived, passage] = [Promise.withResolvers<void>(), Promise.withResolvers<void>()];
  driver.standby = async (instance) => {
    arrived.resolve();
    await passage.promise;
    driver.machines.set(instance.id, { state: "Standby" });
  };
  const sleeping = hypervisor.standby(id, ORIGIN);
  await arrived.promise;
  const woken = hypervisor.restore(id, ORIGIN);
  passage.resolve();
  assert.equal((await sleeping).state, "Standby");
  assert.equal((await woken).state, "Running");
});

test("a start is ended by a deletion, even one that stands behind other requests", async (t) => {
  const { hypervisor, driver, host } = await registryHost(t);
  const { id } = await hypervisor.create(BODY, ORIGIN);
  await hypervisor.stop(id, ORIGIN);
  const slow = gate();
  driver.script.start = gate().script;
  host.hooks.guard("before:update", ({ instance, signal }) => slow.script(instance, signal));
  const first = hypervisor.update(id, { tags: { a: "b" } }, ORIGIN);
  await slow.arrived;
  const starting = assert.rejects(hypervisor.start(id, ORIGIN), { code: "aborted" });
  const second = hypervisor.update(id, { tags: { a: "c" } }, ORIGIN);
  const deleting = hypervisor.delete(id, ORIGIN);
  slow.open();
  await Promise.all([first, starting, second, deleting]);
  assert.deepEqual(hypervisor.list(), []);
});

test("a driver goes once what is under way with it has ended", async (t) => {
  const { hypervisor } = await registryHost(t);
  const driver = Object.assign(new ScriptedDriver(), { name: "other" });
  const registration = hypervisor.register(driver);
  const { id } = await hypervisor.create({ ...BODY, hypervisor: "other" }, ORIGIN);
  const stop = gate();
  driver.script.stop = stop.script;
  const stopping = hypervisor.stop(id, ORIGIN);
  await stop.arrived;
  const gone = registration[Symbol.asyncDispose]().then(() => "gone");
  assert.equal(await Promise.race([gone, new Promise((resolve) => setImmediate(resolve))]), undefined);
  stop.open();
  assert.equal((await stopping).state, "Stopped");
  assert.equal(await gone, "gone");
  await assert.rejects(hypervisor.start(id, ORIGIN), { code: "unknown_driver" });
});

test("delete() asked during a creation waits for it, then removes the instance", async (t) => {
  const { hypervisor, driver } = await registryHost(t);
  const slow = gate();
  driver.script.start = slow.script;
  const creating = hypervisor.create(BODY, ORIGIN);
  await slow.arrived;
  const deleting = hypervisor.delete(hypervisor.resolve("web").id, ORIGIN);
  slow.open();
  assert.equal((await creating).state, "Running");
  await deleting;
  assert.deepEqual([hypervisor.list().length, driver.machines.size], [0, 0]);
});

test("a guard that waits for its own instance is ended by its deadline, and nothing is stuck", async (t) => {
  const selfish = definePlugin({
    name: "selfish",
    requires: ["hypervisor"],
    setup(host) {
      const { update } = host.use("hypervisor");
      host.hooks.guard("before:stop", async ({ instance, origin }) => {
        await update(instance.id, { tags: { asked: "yes" } }, origin);
      }, { timeout: 20 });
    },
  });
  const { hypervisor, event } = await registryHost(t, { plugins: [selfish as Plugin] });
  const { id } = await hypervisor.create(BODY, ORIGIN);
  await assert.rejects(hypervisor.stop(id, ORIGIN), { code: "guard_failed" });
  await event(({ action }) => action === "update");
  assert.deepEqual([hypervisor.find(id)?.state, hypervisor.find(id)?.tags], ["Running", { asked: "yes" }]);
});

// S2: one that does not answer cannot be told; and it holds up neither its own lane nor anybody else.
test("an instance whose driver hangs when it looks is Unknown until it answers", async (t) => {
  mockTimeouts(t);
  const { hypervisor, driver, event } = await registryHost(t);
  const { id } = await hypervisor.create(BODY, ORIGIN);
  const slow = gate();
  let looks = 0;
  driver.script.inspect = (instance, signal) => {
    looks++;
    return slow.script(instance, signal);
  };
  hypervisor.changed(id, "test");
  await slow.arrived;
  t.mock.timers.tick(30_000);
  const { instance } = await event(({ to }) => to === "Unknown");
  assert.match(instance.state_error ?? "", /inspect\(\) of driver "scripted" ran past its deadline of 30000 ms/);
  await assert.rejects(hypervisor.standby(id, ORIGIN), { code: "invalid_state" });
  assert.equal(looks, 1, "is not asked again before it has answered");
  slow.open();
  await new Promise(setImmediate);
  delete driver.script.inspect;
  assert.equal((await hypervisor.standby(id, ORIGIN)).state, "Standby");
});

test("a driver that answers with nonsense makes the instance Unknown", async (t) => {
  const { hypervisor, driver, event } = await registryHost(t);
  const { id } = await hypervisor.create(BODY, ORIGIN);
  for (const nonsense of [undefined, null, {}, { state: "Created" }, { state: "toString" }]) {
    driver.inspect = () => Promise.resolve(nonsense as never);
    hypervisor.changed(id, "test");
    const told = JSON.stringify(nonsense) ?? "undefined";
    const { instance } = await event(({ to, instance }) =>
      to === "Unknown" && instance.state_error === `driver "scripted" answered ${told}`
    );
    assert.equal(instance.id, id);
  }
});

test("a host starts although the driver hangs, and settles with it later", async (t) => {
  const folder = temporaryFolder(t);
  const first = await registryHost(t, { folder });
  const { id: stuck } = await first.hypervisor.create({ ...BODY, name: "stuck" }, ORIGIN);
  const { id: well } = await first.hypervisor.create({ ...BODY, name: "well" }, ORIGIN);
  const { id: going } = await first.hypervisor.create({ ...BODY, name: "going" }, ORIGIN);
  first.driver.script.delete = () => Promise.reject(new Error("busy mount"));
  await assert.rejects(first.hypervisor.delete(going, ORIGIN), { code: "driver_failed" });
  await first.host.close();
  mockTimeouts(t);
  capturedLogs(t);
  const driver = new ScriptedDriver(first.driver.machines);
  const [adopting, deleting] = [gate(), gate()];
  driver.script.adopt = (instance, signal) => instance.id === stuck ? adopting.script(instance, signal) : undefined;
  driver.script.delete = deleting.script;
  const starting = registryHost(t, { folder, driver });
  await Promise.all([adopting.arrived, deleting.arrived]);
  await new Promise(setImmediate);
  t.mock.timers.tick(60_000);
  const { hypervisor, event } = await starting;
  await event(({ instance_id, to }) => instance_id === stuck && to === "Unknown");
  assert.deepEqual([hypervisor.find(well)?.state, hypervisor.find(going)?.transition], ["Running", "delete"]);
  adopting.open();
  deleting.open();
  await event(({ instance_id, action }) => instance_id === going && action === "delete");
  delete driver.script.adopt;
  // That a driver has answered after all is no event: the next look finds out.
  for (let turn = 0; turn < 1000 && hypervisor.find(stuck)?.state === "Unknown"; turn++) {
    hypervisor.changed(stuck, "test");
    await new Promise(setImmediate);
  }
  assert.equal(hypervisor.find(stuck)?.state, "Running");
  assert.equal(driver.calls.filter((call) => call === "adopt").length, 3, "it was not taken over the first time");
});
