import assert from "node:assert/strict";
import { join } from "node:path";
import { test, type TestContext } from "node:test";
import type { Instance } from "../../main.ts";
import { Records } from "../../plugins/hypervisor/records.ts";
import { definePlugin } from "../../main.ts";
import storePlugin from "../../plugins/store.ts";
import { startWith, temporaryFolder } from "../helpers.ts";
import { ORIGIN, registryHost, ScriptedDriver } from "./scripted.ts";

const BODY = { name: "web", image: "any" };

/** Leaves a row as a host leaves it that dies in the middle of an action. */
async function interrupt(t: TestContext, folder: string, id: string, fields: Partial<Instance>): Promise<void> {
  const editor = definePlugin({
    name: "editor",
    requires: ["store"],
    setup(host) {
      new Records(host.use("store"), host.hooks).update(id, fields, { action: "state", origin: ORIGIN });
    },
  });
  const host = await startWith(t, [storePlugin, editor] as never, { folder });
  await host.close();
}

test("a host that starts again adopts what runs and sleeps, and emits nothing for it", async (t) => {
  const folder = temporaryFolder(t);
  const first = await registryHost(t, { folder });
  const { id: awake } = await first.hypervisor.create(BODY, ORIGIN);
  const { id: asleep } = await first.hypervisor.create({ ...BODY, name: "asleep" }, ORIGIN);
  await first.hypervisor.standby(asleep, ORIGIN);
  await first.host.close();
  const seq = first.events.at(-1)!.seq;
  const second = await registryHost(t, { folder, driver: new ScriptedDriver(first.driver.machines) });
  assert.equal(second.hypervisor.find(awake)?.state, "Running");
  assert.equal(second.hypervisor.find(asleep)?.state, "Standby");
  assert.deepEqual(second.events, []);
  await second.hypervisor.restore(asleep, ORIGIN);
  const { seq: next } = await second.event(({ action }) => action === "restore");
  assert.equal(next, seq + 2, "events are numbered on without a gap");
});

test("a host that starts again notices what ended while it was gone", async (t) => {
  const folder = temporaryFolder(t);
  const first = await registryHost(t, { folder });
  const { id } = await first.hypervisor.create(BODY, ORIGIN);
  await first.host.close();
  first.driver.machines.set(id, { state: "Stopped", exit_code: 137, exit_message: "killed by SIGKILL" });
  const second = await registryHost(t, { folder, driver: new ScriptedDriver(first.driver.machines) });
  const { state, exit_code, exit_message } = second.hypervisor.find(id)!;
  assert.deepEqual([state, exit_code, exit_message], ["Stopped", 137, "killed by SIGKILL"]);
});

test("an interrupted action is finished, undone or judged by what the driver finds", async (t) => {
  const cases = [
    { transition: "create", state: "Created", machine: "Running", becomes: undefined },
    { transition: "fork", state: "Standby", machine: "Standby", becomes: "Running" },
    { transition: "fork", state: "Paused", machine: "Running", becomes: "Running" },
    { transition: "delete", state: "Shutdown", machine: "Running", becomes: undefined },
    { transition: "stop", state: "Shutdown", machine: "Running", becomes: "Stopped" },
    { transition: "start", state: "Created", machine: "Running", becomes: "Running" },
    { transition: "standby", state: "Paused", machine: "Running", becomes: "Running" },
    { transition: "standby", state: "Paused", machine: "Standby", becomes: "Standby" },
    { transition: "restore", state: "Paused", machine: "Standby", becomes: "Standby" },
    { transition: "restore", state: "Paused", machine: "Running", becomes: "Running" },
  ] as const;
  for (const { transition, state, machine, becomes } of cases) {
    const folder = join(temporaryFolder(t));
    const first = await registryHost(t, { folder });
    const { id } = await first.hypervisor.create(BODY, ORIGIN);
    await first.host.close();
    await interrupt(t, folder, id, { state, transition });
    first.driver.machines.set(id, { state: machine });
    const { hypervisor, driver } = await registryHost(t, { folder, driver: new ScriptedDriver(first.driver.machines) });
    const found = hypervisor.find(id);
    const label = `${transition} with the driver at ${machine}`;
    assert.equal(found?.state, becomes, label);
    assert.equal(found?.transition ?? null, null, label);
    assert.equal(driver.machines.has(id), becomes !== undefined, label);
    assert.equal(becomes === undefined || driver.machines.get(id)?.state === becomes, true, label);
  }
});

// Nobody was told that it was stopped, and tried again and again it could be neither woken nor stopped meanwhile.
test("an interrupted stop that the driver cannot finish leaves the instance as it is", async (t) => {
  const folder = temporaryFolder(t);
  const first = await registryHost(t, { folder });
  const { id } = await first.hypervisor.create(BODY, ORIGIN);
  await first.host.close();
  await interrupt(t, folder, id, { state: "Shutdown", transition: "stop" });
  first.driver.machines.set(id, { state: "Standby" });
  const driver = new ScriptedDriver(first.driver.machines);
  driver.script.stop = () => Promise.reject(new Error("it does not wake"));
  const { hypervisor } = await registryHost(t, { folder, driver });
  const { state, transition } = hypervisor.find(id)!;
  assert.deepEqual([state, transition], ["Standby", null]);
  delete driver.script.stop;
  assert.equal((await hypervisor.stop(id, ORIGIN)).state, "Stopped");
});

test("an instance whose driver is not loaded is Unknown and says which", async (t) => {
  const folder = temporaryFolder(t);
  const first = await registryHost(t, { folder });
  const { id } = await first.hypervisor.create(BODY, ORIGIN);
  await first.host.close();
  await interrupt(t, folder, id, { driver: "gone" });
  const { hypervisor } = await registryHost(t, { folder });
  assert.equal(hypervisor.find(id)?.state, "Unknown");
  assert.match(hypervisor.find(id)?.state_error ?? "", /No driver "gone"/);
});

test("a deletion that failed is tried again by the reconcile", async (t) => {
  const { hypervisor, driver, event } = await registryHost(t, { table: { reconcile_interval: "100ms" } });
  const { id } = await hypervisor.create(BODY, ORIGIN);
  driver.script.delete = () => Promise.reject(new Error("busy mount"));
  await assert.rejects(hypervisor.delete(id, ORIGIN), { code: "driver_failed" });
  assert.equal(hypervisor.find(id)?.transition, "delete");
  delete driver.script.delete;
  const { cause } = await event(({ action }) => action === "delete");
  assert.equal(cause, "delete_retried");
});

test("a crash that nobody reported is noticed by the reconcile", async (t) => {
  const { hypervisor, driver, event } = await registryHost(t, { table: { reconcile_interval: "100ms" } });
  const { id } = await hypervisor.create(BODY, ORIGIN);
  driver.machines.set(id, { state: "Stopped", exit_code: null, exit_message: "gone" });
  const { cause } = await event(({ to }) => to === "Stopped");
  assert.equal(cause, "reconcile");
});

test("phases sum to the lifetime exactly, and a clock that steps back adds nothing", async (t) => {
  let now = 1_000_000;
  const clock = definePlugin({
    name: "clock",
    requires: ["store"],
    setup(host) {
      const records = new Records(host.use("store"), host.hooks, () => now);
      const draft = { id: "a", name: "a", state: "Created", phases: { since: now, totals: {} } } as unknown as Instance;
      records.insert(draft, { action: "create", origin: ORIGIN });
      const to = (state: Instance["state"], at: number) => {
        now = at;
        return records.update("a", { state }, { action: "state", origin: ORIGIN });
      };
      to("Running", 1_000_500);
      to("Running", 1_000_700);
      to("Standby", 1_002_000);
      to("Running", 1_001_000);
      const { phases } = to("Stopped", 1_004_000);
      assert.deepEqual(phases, { since: 1_004_000, totals: { Created: 500, Running: 1500 + 3000, Standby: 0 } });
    },
  });
  await startWith(t, [storePlugin, clock] as never);
});

// S7: the deadline counts from the request, and one deletion that hangs holds up no other.
test("an instance past its ttl is deleted, whatever becomes of another", async (t) => {
  const { hypervisor, driver, event } = await registryHost(t);
  const stuck = await hypervisor.create({ ...BODY, name: "stuck", ttl: "20ms" }, ORIGIN);
  const hang = Promise.withResolvers<void>();
  driver.script.delete = ({ id }) => id === stuck.id ? hang.promise : undefined;
  const { id } = await hypervisor.create({ ...BODY, ttl: "30ms" }, ORIGIN);
  const { actor, cause } = await event(({ action, instance_id }) => action === "delete" && instance_id === id);
  assert.deepEqual([actor, cause], ["system", "expired"]);
  hang.resolve();
  await event(({ action, instance_id }) => action === "delete" && instance_id === stuck.id);
});

test("ttl and expires_at are checked alike on create and update", async (t) => {
  const { hypervisor } = await registryHost(t);
  const { id, expires_at } = await hypervisor.create({ ...BODY, ttl: "1h" }, ORIGIN);
  assert.ok(expires_at! > Date.now());
  const bad = [
    [{ ttl: "soon" }, "invalid_ttl"],
    [{ ttl: "-1s" }, "invalid_ttl"],
    [{ expires_at: "tomorrow" }, "invalid_expires_at"],
    [{ expires_at: "2001-01-01T00:00:00Z" }, "invalid_expires_at"],
    [{ ttl: "1h", expires_at: "2999-01-01T00:00:00Z" }, "invalid_request"],
  ] as const;
  for (const [body, code] of bad) {
    await assert.rejects(hypervisor.update(id, body, ORIGIN), { code }, JSON.stringify(body));
    await assert.rejects(
      hypervisor.create({ ...BODY, name: "other", ...body }, ORIGIN),
      { code },
      JSON.stringify(body),
    );
  }
  assert.equal((await hypervisor.update(id, { ttl: "0s" }, ORIGIN)).expires_at, null);
});

// S10: what a plugin remembers about an instance survives a restart. S6: it goes with the instance, and what is saved
// while that is being removed, or later, does not bring it back.
test("extend() adds a field that is stored, presented and forgotten with its instance", async (t) => {
  const { default: v } = await import("valibot").then((module) => ({ default: module }));
  const folder = temporaryFolder(t);
  const naps = () => {
    let extension: ReturnType<Fixture["hypervisor"]["extend"]>;
    const plugin = definePlugin({
      name: "naps",
      requires: ["hypervisor"],
      setup(host) {
        extension = host.use("hypervisor").extend({
          field: "naps",
          schema: v.strictObject({ max: v.number() }),
          present: (_instance, _policy, runtime) => ({ naps_taken: runtime ?? 0 }),
        }) as typeof extension;
      },
    });
    return { plugin: plugin as never, of: () => extension };
  };
  const a = naps();
  const first = await registryHost(t, { folder, plugins: [a.plugin] });
  const { id } = await first.hypervisor.create({ ...BODY, naps: { max: 3 } }, ORIGIN);
  a.of().save(id, 2);
  assert.deepEqual(first.hypervisor.present(first.hypervisor.find(id)!).naps_taken, 2);
  await first.host.close();
  const b = naps();
  const second = await registryHost(t, {
    folder,
    plugins: [b.plugin],
    driver: new ScriptedDriver(first.driver.machines),
  });
  assert.equal(b.of().runtime(id), 2);
  assert.deepEqual(b.of().policy(second.hypervisor.find(id)!), { max: 3 });
  const shown = JSON.parse(second.hypervisor.presentJson(second.hypervisor.find(id)!));
  assert.deepEqual([shown.naps, shown.naps_taken], [{ max: 3 }, 2]);
  assert.equal((await second.hypervisor.update(id, { naps: null }, ORIGIN)).policies.naps, undefined);
  second.driver.script.delete = () => b.of().save(id, 8);
  await second.hypervisor.delete(id, ORIGIN);
  b.of().save(id, 9);
  assert.equal(b.of().runtime(id), undefined);
  await second.host.close();
  const c = naps();
  await registryHost(t, { folder, plugins: [c.plugin] });
  assert.equal(c.of().runtime(id), undefined);
});

type Fixture = Awaited<ReturnType<typeof registryHost>>;

test("a field whose plugin is off is refused, naming the plugin to turn on", async (t) => {
  const { hypervisor } = await registryHost(t);
  for (const [field, plugin] of [["auto_standby", "conntrack-standby"], ["health_check", "health"]]) {
    await assert.rejects(hypervisor.create({ ...BODY, [field]: {} }, ORIGIN), {
      code: "feature_off",
      details: { field, plugin },
    });
  }
});
