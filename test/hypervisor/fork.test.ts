import assert from "node:assert/strict";
import { cpSync } from "node:fs";
import { test } from "node:test";
import { temporaryFolder } from "../helpers.ts";
import { gate, ORIGIN, registryHost, ScriptedDriver } from "./scripted.ts";

const BODY = { name: "web", image: "any" };
const RUNNING = { name: "copy", from_running: true };

test("fork() of a running instance leaves it running when the copy fails, and no copy", async (t) => {
  const { hypervisor, driver } = await registryHost(t);
  const { id } = await hypervisor.create(BODY, ORIGIN);
  driver.script.fork = () => Promise.reject(new Error("no room"));
  await assert.rejects(hypervisor.fork(id, RUNNING, ORIGIN), {
    code: "driver_failed",
    message: 'Cannot fork instance "copy": no room',
  });
  const [source, ...others] = hypervisor.list();
  assert.deepEqual([source.state, source.transition, others.length], ["Running", null, 0]);
  assert.equal(driver.machines.get(id)?.state, "Running");
});

test("fork() that cannot put its source to sleep fails with the reason, and tells what the source is now", async (t) => {
  const { hypervisor, driver, event } = await registryHost(t);
  const { id } = await hypervisor.create(BODY, ORIGIN);
  driver.script.standby = () => {
    driver.machines.set(id, { state: "Stopped", exit_code: 1, exit_message: "it died of it" });
    throw new Error("no frame");
  };
  await assert.rejects(hypervisor.fork(id, RUNNING, ORIGIN), {
    code: "driver_failed",
    message: 'Cannot fork instance "web": no frame',
  });
  const { instance } = await event(({ cause }) => cause === "fork_failed");
  assert.deepEqual([instance.state, instance.transition, instance.exit_code], ["Stopped", null, 1]);
});

test("fork() whose source does not wake again says so, keeps the copy and the source asleep", async (t) => {
  const { hypervisor, driver } = await registryHost(t);
  const { id } = await hypervisor.create(BODY, ORIGIN);
  driver.script.restore = () => Promise.reject(new Error("bad memory"));
  await assert.rejects(hypervisor.fork(id, RUNNING, ORIGIN), {
    code: "driver_failed",
    message: 'Cannot fork instance "web": copied to "copy", but it could not be restored: bad memory',
  });
  assert.deepEqual(hypervisor.list().map(({ name, state }) => [name, state]), [["web", "Standby"], [
    "copy",
    "Standby",
  ]]);
  driver.script.fork = () => Promise.reject(new Error("no room"));
  delete driver.script.restore;
  await hypervisor.restore(id, ORIGIN);
  driver.script.restore = () => Promise.reject(new Error("bad memory"));
  await assert.rejects(hypervisor.fork(id, { ...RUNNING, name: "other" }, ORIGIN), {
    message: /no room; it could not be restored: bad memory$/,
  });
});

test("fork() removes a copy that cannot be brought to the state that was asked for", async (t) => {
  const { hypervisor, driver } = await registryHost(t);
  const { id } = await hypervisor.create(BODY, ORIGIN);
  await hypervisor.stop(id, ORIGIN);
  driver.script.start = () => Promise.reject(new Error("port in use"));
  const wanted = { name: "copy", target_state: "Running" };
  await assert.rejects(hypervisor.fork(id, wanted, ORIGIN), { code: "driver_failed", message: /port in use/ });
  assert.deepEqual([hypervisor.list().length, driver.machines.size], [1, 1]);
  delete driver.script.start;
  assert.equal((await hypervisor.fork(id, wanted, ORIGIN)).state, "Running");
});

// S2: a copy that nobody can read is not said to be what its source is.
test("fork() removes a copy that cannot be read", async (t) => {
  const { hypervisor, driver } = await registryHost(t);
  const { id } = await hypervisor.create(BODY, ORIGIN);
  await hypervisor.stop(id, ORIGIN);
  driver.script.inspect = () => Promise.reject(new Error("socket is gone"));
  await assert.rejects(hypervisor.fork(id, { name: "copy" }, ORIGIN), { message: /socket is gone/ });
  assert.equal(hypervisor.list().length, 1);
});

test("fork() brings the copy to each state from each", async (t) => {
  const { hypervisor } = await registryHost(t);
  let n = 0;
  for (const from of ["Stopped", "Standby", "Running"] as const) {
    const { id } = await hypervisor.create({ ...BODY, name: `source-${n++}` }, ORIGIN);
    if (from === "Stopped") await hypervisor.stop(id, ORIGIN);
    if (from === "Standby") await hypervisor.standby(id, ORIGIN);
    for (const target_state of ["Stopped", "Standby", "Running"] as const) {
      const copy = await hypervisor.fork(id, { name: `copy-${n++}`, target_state, from_running: true }, ORIGIN);
      assert.equal(copy.state, target_state, `${from} to ${target_state}`);
      assert.deepEqual([hypervisor.find(id)?.state, hypervisor.find(id)?.transition], [from, null]);
    }
  }
});

test("fork() does not put its source to sleep for a name that is taken, and refuses what it cannot do before", async (t) => {
  const { hypervisor, driver } = await registryHost(t);
  const { id } = await hypervisor.create(BODY, ORIGIN);
  await assert.rejects(hypervisor.fork(id, { name: "copy" }, ORIGIN), {
    code: "invalid_state",
    message: 'Cannot fork instance "web": state is Running; "from_running": true copies it',
  });
  await assert.rejects(hypervisor.fork(id, { ...RUNNING, name: "web" }, ORIGIN), { code: "name_conflict" });
  driver.features.delete("standby");
  await assert.rejects(hypervisor.fork(id, RUNNING, ORIGIN), { code: "not_supported" });
  assert.equal(driver.calls.includes("standby"), false);
});

test("delete() of a source waits for its fork; wait() for the source lasts until it runs again", async (t) => {
  const { hypervisor, driver } = await registryHost(t);
  const { id } = await hypervisor.create(BODY, ORIGIN);
  const slow = gate();
  driver.script.fork = slow.script;
  const forking = hypervisor.fork(id, RUNNING, ORIGIN);
  await slow.arrived;
  assert.equal(hypervisor.find(id)?.state, "Standby");
  const running = hypervisor.wait(id, "Running", { timeout: 300_000 });
  const deleting = hypervisor.delete(id, ORIGIN);
  slow.open();
  assert.equal((await forking).name, "copy");
  assert.equal((await running).state, "Running");
  await deleting;
  assert.deepEqual(hypervisor.list().map(({ name }) => name), ["copy"]);
});

test("a host that dies while it forks a running instance wakes it at the next start", async (t) => {
  const folder = temporaryFolder(t);
  const first = await registryHost(t, { folder });
  const { id } = await first.hypervisor.create(BODY, ORIGIN);
  const slow = gate();
  first.driver.script.fork = slow.script;
  // Nothing but a copy of the files is what a power cut leaves: the first host itself goes on.
  const forking = first.hypervisor.fork(id, RUNNING, ORIGIN);
  await slow.arrived;
  const after = temporaryFolder(t);
  cpSync(folder, after, { recursive: true });
  const driver = new ScriptedDriver(new Map(first.driver.machines));
  const { hypervisor } = await registryHost(t, { folder: after, driver });
  assert.deepEqual(hypervisor.list().map(({ name, state, transition }) => [name, state, transition]), [
    ["web", "Running", null],
  ]);
  assert.equal(driver.machines.get(id)?.state, "Running");
  slow.open();
  await forking;
});

test("fork() to Standby waits for a copy that takes its time to run, and removes one that never does", async (t) => {
  const { hypervisor, driver, events } = await registryHost(t);
  const { id } = await hypervisor.create(BODY, ORIGIN);
  await hypervisor.stop(id, ORIGIN);
  driver.ready = "Initializing";
  let looks = 0;
  driver.script.inspect = (instance) => {
    if (instance.name === "copy" && instance.state === "Initializing" && ++looks === 3) {
      driver.machines.set(instance.id, { state: "Running" });
    }
  };
  const copy = await hypervisor.fork(id, { name: "copy", target_state: "Standby" }, ORIGIN);
  assert.deepEqual([copy.state, copy.transition], ["Standby", null]);
  const states = events.filter(({ instance_id }) => instance_id === copy.id).map(({ to }) => to);
  assert.deepEqual(states.filter((to, i) => to !== states[i - 1]), [
    ...["Created", "Stopped", "Created", "Initializing", "Running", "Paused", "Standby"],
  ]);

  driver.script.inspect = (instance) => {
    if (instance.state !== "Initializing") return;
    driver.machines.set(instance.id, { state: "Stopped", exit_code: 1, exit_message: "it broke" });
  };
  const wanted = { name: "other", target_state: "Standby" };
  await assert.rejects(hypervisor.fork(id, wanted, ORIGIN), { message: /it is Stopped after its start/ });
  assert.deepEqual(hypervisor.list().map(({ name }) => name), ["web", "copy"]);
});

// Nobody was told of it, and whoever asks again gets it.
test("a host that dies before a copy is as it was wanted leaves none to the next one", async (t) => {
  const folder = temporaryFolder(t);
  const first = await registryHost(t, { folder });
  const { id } = await first.hypervisor.create(BODY, ORIGIN);
  await first.hypervisor.standby(id, ORIGIN);
  const slow = gate();
  first.driver.script.restore = slow.script;
  const wanted = { name: "copy", target_state: "Running" };
  const forking = first.hypervisor.fork(id, wanted, ORIGIN);
  await slow.arrived;
  const after = temporaryFolder(t);
  cpSync(folder, after, { recursive: true });
  const driver = new ScriptedDriver(new Map(first.driver.machines));
  const { hypervisor } = await registryHost(t, { folder: after, driver });
  assert.deepEqual(hypervisor.list().map(({ name, state }) => [name, state]), [["web", "Standby"]]);
  assert.equal(driver.machines.size, 1);
  assert.equal((await hypervisor.fork(id, wanted, ORIGIN)).state, "Running");
  slow.open();
  assert.equal((await forking).state, "Running");
});
