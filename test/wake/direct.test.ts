import assert from "node:assert/strict";
import { test } from "node:test";
import { settle } from "../clock.ts";
import { flow, ORIGIN, world } from "../conntrack-standby/world.ts";
import { capturedLogs, cleanup, temporaryFolder, until } from "../helpers.ts";
import { directPlugin } from "./direct.ts";

const DAY_MS = 86_400_000;
const plugins = [directPlugin];

// W11: nothing that wakes grows old, neither by a day of silence nor by one in which the source was lost again and again.
test("an instance that slept for a day is woken by the first connection", async (t) => {
  capturedLogs(t);
  const { instance, clock, kernel, state, events } = await world(t, { plugins });
  const { id } = await instance();
  await clock.pass(10_000);
  for (const day of ["quiet", "restless"]) {
    assert.equal(state(id), "Standby");
    for (let hour = 0; hour < 24; hour++) {
      await clock.pass(DAY_MS / 24);
      if (day === "quiet") continue;
      kernel.lose();
      kernel.connect();
    }
    assert.equal(state(id), "Standby", `after a ${day} day`);
    kernel.set(flow({ state: "SYN_SENT" }));
    await settle(8);
    assert.equal(state(id), "Running", `after a ${day} day`);
    kernel.destroy(flow());
    await clock.pass(20_000);
  }
  assert.deepEqual(
    events.filter(({ action }) => action === "restore").map(({ actor, cause }) => `${actor} ${cause}`),
    ["wake connection", "wake connection"],
  );
});

// W16: it listens before it looks, and a look that failed is no look.
test("a connection that comes in the middle of a resync wakes, heard or not", async (t) => {
  const { instance, clock, kernel, state, hypervisor } = await world(t, { plugins });
  const { id } = await instance();
  for (const heard of [true, false]) {
    if (state(id) !== "Standby") await hypervisor.standby(id, ORIGIN);
    await settle(8);
    kernel.duringDump = async () => {
      kernel.duringDump = undefined;
      kernel.deaf = !heard;
      kernel.set(flow());
      kernel.deaf = false;
      if (!heard) kernel.connect(); // as the source does after it has lost events
      await settle(2);
    };
    kernel.connect();
    await settle(12);
    assert.equal(state(id), "Running");
    kernel.destroy(flow());
  }
  await clock.pass(20_000);
  assert.equal(state(id), "Standby");
});

// R2, R5: told of while it was awake, it would be frozen in the middle of its request, and nothing would tell of it again.
test("a connection that began between the request to sleep and the sleep is served", async (t) => {
  const { instance, kernel, state, hypervisor, host } = await world(t, { plugins });
  const { id } = await instance();
  // Another guard may think about it for longer than any event is late.
  const [now, later] = [Date.now, { ms: 0 }];
  const clock = t.mock.method(Date, "now", () => now() + later.ms);
  cleanup(t).defer(() => clock.mock.restore());
  const meanwhile = host.hooks.guard("before:standby", () => {
    kernel.set(flow());
    later.ms = 250;
  }, { priority: 100 });
  await hypervisor.standby(id, ORIGIN).catch((error) => assert.equal(error.code, "aborted"));
  await settle(12);
  assert.equal(state(id), "Running");
  // One that is over by then has nobody who waits.
  meanwhile[Symbol.dispose]();
  kernel.set(flow({ state: "TIME_WAIT" }));
  await hypervisor.standby(id, ORIGIN);
  await settle(12);
  assert.equal(state(id), "Standby");
});

// W16: nor is a failure taken for an empty table.
test("a resync that fails is made again until it does not, and finds who waits", async (t) => {
  const logs = capturedLogs(t);
  const { instance, kernel, state, hypervisor, events } = await world(t, { plugins });
  const { id } = await instance();
  await hypervisor.standby(id, ORIGIN);
  await settle(8);
  kernel.deaf = true;
  kernel.set(flow());
  kernel.duringDump = () => Promise.reject(new Error("no answer"));
  t.mock.timers.enable({ apis: ["setTimeout"] });
  t.after(() => t.mock.timers.reset());
  kernel.lose();
  kernel.connect();
  for (let tries = 0; tries < 3; tries++) {
    await settle(8);
    const { dumps } = kernel;
    t.mock.timers.tick(2_000);
    await settle(8);
    assert.ok(kernel.dumps > dumps, "it looks again");
    assert.equal(state(id), "Standby");
  }
  kernel.duringDump = undefined;
  t.mock.timers.tick(2_000);
  await settle(8);
  t.mock.timers.reset();
  assert.equal(state(id), "Running");
  assert.equal(events.find(({ action }) => action === "restore")?.actor, "wake");
  assert.ok(logs.some((line) => line.includes("Cannot read the table of connections: no answer")));
});

// W18: Standby is a state of its own, not an end: whoever clears up what has ended leaves it.
test("reconcile, looks, the expiry of others and a restart leave a sleeping instance asleep", async (t) => {
  const folder = temporaryFolder(t);
  const tables = { hypervisor: { default_driver: "scripted", reconcile_interval: "100ms" } };
  const first = await world(t, { plugins, folder, tables });
  const { hypervisor, driver, clock, kernel } = first;
  const { id } = await first.instance();
  await hypervisor.standby(id, ORIGIN);
  const { revision } = hypervisor.find(id)!;
  let looks = 0;
  driver.script.inspect = (instance) => void (looks += Number(instance.id === id));
  const short = await hypervisor.create({ name: "short", image: "x", ttl: "1s" }, ORIGIN);
  hypervisor.changed(id, "test");
  await until("the other one has gone", () => hypervisor.find(short.id) === undefined);
  await until("the reconcile has looked, again", () => looks > 1);
  const asleep = hypervisor.find(id)!;
  assert.deepEqual([asleep.state, asleep.exit_code, asleep.stopped_at, asleep.revision], [
    "Standby",
    null,
    null,
    revision,
  ]);
  await first.host.close();
  const second = await world(t, { plugins, folder, tables, driver, clock, kernel });
  assert.equal(second.state(id), "Standby");
  assert.equal(driver.machines.get(id)?.state, "Standby");
  kernel.set(flow());
  await settle(8);
  assert.equal(second.state(id), "Running");
});
