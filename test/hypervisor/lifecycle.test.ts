import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { definePlugin, DormouseError, type LifecycleEvent, type Plugin, Veto } from "../../main.ts";
import { gate, ORIGIN, registryHost } from "./scripted.ts";

const BODY = { name: "web", image: "any" };
const coded = (code: string) => (error: unknown) => error instanceof DormouseError && error.code === code;
const steps = (events: LifecycleEvent[]) => events.map(({ action, from, to }) => `${action} ${from}>${to}`);

test("create() makes a row, runs it and emits create and start", async (t) => {
  const { hypervisor, host, events } = await registryHost(t);
  const instance = await hypervisor.create(BODY, ORIGIN);
  assert.equal(instance.state, "Running");
  await host.close();
  assert.deepEqual(steps(events), ["create null>Created", "start Created>Running"]);
  assert.deepEqual(events.map(({ seq }) => seq), [1, 2]);
  assert.ok(events.every(({ actor, cause }) => actor === "test" && cause === "request"));
});

test("create() keeps the size that the driver gives", async (t) => {
  const { hypervisor, driver } = await registryHost(t);
  driver.size = { vcpus: 2, memory_bytes: 64 * 1024 * 1024 };
  const { id } = await hypervisor.create(BODY, ORIGIN);
  const { vcpus, size } = hypervisor.present(hypervisor.find(id)!);
  assert.deepEqual([vcpus, size], [2, "64MB"]);
});

test("create() leaves nothing behind when the driver fails", async (t) => {
  const { hypervisor, driver } = await registryHost(t);
  for (const method of ["validate", "create", "start"] as const) {
    driver.script[method] = () => Promise.reject(new Error("out of clay"));
    await assert.rejects(hypervisor.create(BODY, ORIGIN), {
      code: "driver_failed",
      message: 'Cannot create instance "web": out of clay',
    }, method);
    delete driver.script[method];
    assert.deepEqual(hypervisor.list(), [], method);
    assert.equal(driver.machines.size, 0, method);
  }
  assert.equal((await hypervisor.create(BODY, ORIGIN)).state, "Running");
});

test("create() gives a name to one instance when many ask for it at once", async (t) => {
  const { hypervisor } = await registryHost(t);
  const results = await Promise.allSettled(Array.from({ length: 20 }, () => hypervisor.create(BODY, ORIGIN)));
  const refused = results.filter((result) => result.status === "rejected");
  assert.equal(refused.length, 19);
  assert.ok(refused.every(({ reason }) => coded("name_conflict")(reason)));
});

// hypeman: LifecycleNoopTransitionsReturnCurrentInstanceWithoutEvent
test("an action that is fulfilled already returns the instance and emits nothing", async (t) => {
  const { hypervisor, host, events } = await registryHost(t);
  const { id } = await hypervisor.create(BODY, ORIGIN);
  await hypervisor.start(id, ORIGIN);
  await hypervisor.restore(id, ORIGIN);
  await hypervisor.resume(id, ORIGIN);
  await hypervisor.standby(id, ORIGIN);
  await hypervisor.standby(id, ORIGIN);
  await hypervisor.stop(id, ORIGIN);
  await hypervisor.stop(id, ORIGIN);
  await host.close();
  const concluded = events.filter(({ action }) => action !== "state").map(({ action }) => action);
  assert.deepEqual(concluded, ["create", "start", "standby", "stop"]);
});

test("the same action asked twice at once is carried out once", async (t) => {
  const { hypervisor, driver } = await registryHost(t);
  const { id } = await hypervisor.create(BODY, ORIGIN);
  const slow = gate();
  driver.script.standby = slow.script;
  const both = [hypervisor.standby(id, ORIGIN), hypervisor.standby(id, ORIGIN)];
  await slow.arrived;
  both.push(hypervisor.standby(id, ORIGIN));
  slow.open();
  const [a, b, c] = await Promise.all(both);
  assert.ok(a === b && b === c);
  assert.equal(driver.calls.filter((call) => call === "standby").length, 1);
});

// R8: an instance needed again while it is being suspended does not wait for the suspend to end.
test("restore() aborts a standby under way, and the instance runs on", async (t) => {
  const { hypervisor, driver } = await registryHost(t);
  const { id } = await hypervisor.create(BODY, ORIGIN);
  const slow = gate();
  driver.script.standby = slow.script;
  const sleeping = hypervisor.standby(id, ORIGIN);
  await slow.arrived;
  assert.equal(hypervisor.find(id)?.state, "Paused");
  const woken = hypervisor.restore(id, ORIGIN);
  await assert.rejects(sleeping, coded("aborted"));
  assert.equal((await woken).state, "Running");
  assert.equal(driver.calls.includes("restore"), false);
});

test("a start asked during a stop queues behind it", async (t) => {
  const { hypervisor, driver } = await registryHost(t);
  const { id } = await hypervisor.create(BODY, ORIGIN);
  const slow = gate();
  driver.script.stop = slow.script;
  const stopping = hypervisor.stop(id, ORIGIN);
  await slow.arrived;
  const starting = hypervisor.start(id, ORIGIN);
  slow.open();
  assert.equal((await stopping).state, "Stopped");
  assert.equal((await starting).state, "Running");
});

// S1: delete must not replace the lock that others still hold.
test("requests behind a delete find the instance gone, and a new one of its name is another", async (t) => {
  const { hypervisor, driver } = await registryHost(t);
  const { id } = await hypervisor.create(BODY, ORIGIN);
  const slow = gate();
  driver.script.delete = slow.script;
  const deleting = hypervisor.delete(id, ORIGIN);
  await slow.arrived;
  const late = [hypervisor.start(id, ORIGIN), hypervisor.update(id, { tags: { a: "b" } }, ORIGIN)].map((p) =>
    assert.rejects(p, coded("not_found"))
  );
  const joined = hypervisor.delete(id, ORIGIN);
  slow.open();
  await Promise.all([deleting, joined, ...late]);
  delete driver.script.delete;
  const again = await hypervisor.create(BODY, ORIGIN);
  assert.notEqual(again.id, id);
  assert.equal(driver.machines.size, 1);
});

test("a failed action leaves the state that the driver sees", async (t) => {
  const { hypervisor, driver, event } = await registryHost(t);
  const { id } = await hypervisor.create(BODY, ORIGIN);
  driver.script.standby = () => Promise.reject(new Error("disk full"));
  await assert.rejects(hypervisor.standby(id, ORIGIN), {
    code: "driver_failed",
    message: 'Cannot standby instance "web": disk full',
  });
  assert.equal(hypervisor.find(id)?.state, "Running");
  const { detail } = await event(({ cause }) => cause === "standby_failed");
  assert.deepEqual(detail, { error: "disk full" });
});

test("an action that the state does not allow is refused with the state", async (t) => {
  const { hypervisor } = await registryHost(t);
  const { id } = await hypervisor.create(BODY, ORIGIN);
  await hypervisor.stop(id, ORIGIN);
  await assert.rejects(hypervisor.restore(id, ORIGIN), {
    code: "invalid_state",
    message: 'Cannot restore instance "web": state is Stopped',
  });
});

// S2: what cannot be told is Unknown with the reason, and nothing acts on it but a deletion.
test("an instance that cannot be read is Unknown until it can", async (t) => {
  const { hypervisor, driver, event } = await registryHost(t);
  const { id } = await hypervisor.create(BODY, ORIGIN);
  driver.script.inspect = () => Promise.reject(new Error("socket is gone"));
  hypervisor.changed(id, "test");
  await event(({ to }) => to === "Unknown");
  assert.equal(hypervisor.find(id)?.state_error, "socket is gone");
  await assert.rejects(hypervisor.standby(id, ORIGIN), coded("invalid_state"));
  assert.equal(driver.calls.includes("standby"), false);
  delete driver.script.inspect;
  assert.equal((await hypervisor.standby(id, ORIGIN)).state, "Standby", "looked again before it refused");
});

test("what ends by itself is noticed, with its exit code", async (t) => {
  const { hypervisor, driver, event } = await registryHost(t);
  const { id } = await hypervisor.create(BODY, ORIGIN);
  driver.machines.set(id, { state: "Stopped", exit_code: 3, exit_message: "exited with code 3" });
  hypervisor.changed(id, "exit");
  const { action, instance, actor, cause } = await event(({ to }) => to === "Stopped");
  assert.deepEqual([action, actor, cause], ["state", "system", "exit"]);
  assert.deepEqual([instance.exit_code, instance.exit_message], [3, "exited with code 3"]);
});

test("a guard vetoes with its code and reason, and the instance is untouched", async (t) => {
  const busy = definePlugin({
    name: "busy",
    setup(host) {
      host.hooks.guard("before:standby", () => {
        throw new Veto("work_in_progress", "a build runs");
      });
    },
  });
  const { hypervisor, driver, events, host } = await registryHost(t, { plugins: [busy as Plugin] });
  const { id } = await hypervisor.create(BODY, ORIGIN);
  await assert.rejects(hypervisor.standby(id, ORIGIN), {
    code: "vetoed",
    details: { plugin: "busy", code: "work_in_progress", reason: "a build runs" },
  });
  assert.equal(driver.calls.includes("standby"), false);
  await host.close();
  assert.equal(events.length, 2);
});

test("a commit hook that throws rolls the change back", async (t) => {
  let fail = false;
  const ledger = definePlugin({
    name: "ledger",
    setup(host) {
      host.hooks.commit("instance:commit", () => {
        if (fail) throw new Error("no ink");
      });
    },
  });
  const { hypervisor, host, events } = await registryHost(t, { plugins: [ledger as Plugin] });
  const { id, revision } = await hypervisor.create(BODY, ORIGIN);
  fail = true;
  await assert.rejects(hypervisor.update(id, { tags: { a: "b" } }, ORIGIN), /no ink/);
  fail = false;
  assert.equal(hypervisor.find(id)?.revision, revision);
  assert.equal((await hypervisor.update(id, { tags: { a: "c" } }, ORIGIN)).tags.a, "c");
  await host.close();
  assert.deepEqual(events.map(({ seq }) => seq), [1, 2, 3]);
});

// E8: every event tells who and why; and an instance's events chain without a gap.
test("events chain per instance, whatever is asked at once (property)", async (t) => {
  const { hypervisor, host, events, driver } = await registryHost(t);
  const actions = ["start", "stop", "pause", "resume", "standby", "restore", "delete"] as const;
  let n = 0;
  await fc.assert(
    fc.asyncProperty(fc.array(fc.constantFrom(...actions), { minLength: 1, maxLength: 12 }), async (asked) => {
      const { id } = await hypervisor.create({ ...BODY, name: `p${n++}` }, ORIGIN);
      const results = await Promise.allSettled(asked.map((action) => hypervisor[action](id, ORIGIN)));
      for (const result of results) {
        if (result.status === "rejected") {
          assert.ok(["invalid_state", "aborted", "not_found"].includes(result.reason.code), result.reason);
        }
      }
      const instance = hypervisor.find(id);
      assert.equal(instance?.state, driver.machines.get(id)?.state);
      assert.equal(instance?.transition ?? null, null);
    }),
    { numRuns: 60 },
  );
  await host.close();
  const last = new Map<string, string | null>();
  events.forEach(({ seq, instance_id, from, to, actor, cause }, i) => {
    assert.equal(seq, i + 1);
    assert.equal(from, last.get(instance_id) ?? null);
    assert.ok(actor !== "" && cause !== "");
    last.set(instance_id, to);
  });
});

test("fork() copies what was asked for, not the history, the address or the expiry", async (t) => {
  const { hypervisor } = await registryHost(t);
  const source = await hypervisor.create({ ...BODY, env: { A: "1" }, ttl: "1h" }, ORIGIN);
  await assert.rejects(hypervisor.fork(source.id, { name: "copy" }, ORIGIN), coded("invalid_state"));
  const copy = await hypervisor.fork(source.id, { name: "copy", from_running: true }, ORIGIN);
  assert.deepEqual([copy.state, copy.env, copy.expires_at], ["Standby", { A: "1" }, null]);
  assert.notEqual(copy.id, source.id);
  assert.equal(hypervisor.find(source.id)?.state, "Running");
  await assert.rejects(
    hypervisor.fork(source.id, { name: "copy", from_running: true }, ORIGIN),
    coded("name_conflict"),
  );
  assert.equal(hypervisor.find(source.id)?.state, "Running");
  const third = await hypervisor.fork(copy.id, { name: "third", target_state: "Running" }, ORIGIN);
  assert.equal(third.state, "Running");
});
