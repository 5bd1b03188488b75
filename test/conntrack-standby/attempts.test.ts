import assert from "node:assert/strict";
import { test } from "node:test";
import { definePlugin, Veto } from "../../main.ts";
import { capturedLogs } from "../helpers.ts";
import { gate } from "../hypervisor/scripted.ts";
import { settle } from "../clock.ts";
import { flow, ORIGIN, world } from "./world.ts";

// I4: what is placed in the middle of the confirming dump counts.
test("a connection or another action during the confirming dump ends the attempt", async (t) => {
  const { instance, clock, kernel, state, said, hypervisor } = await world(t);
  const { id } = await instance();
  kernel.duringDump = () => {
    kernel.duringDump = undefined;
    kernel.set(flow());
    kernel.destroy(flow());
  };
  await clock.pass(10_000);
  assert.equal(state(id), "Running");
  assert.deepEqual(said(), ["requested ready_for_standby", "cancelled activity"]);
  kernel.duringDump = () => {
    kernel.duringDump = undefined;
    return hypervisor.pause(id, ORIGIN).then(() => settle());
  };
  await clock.pass(10_000);
  assert.equal(said().at(-1), "cancelled state");
  assert.equal(state(id), "Paused");
});

// I4, R2: what comes while the guards are asked is seen under the lock, before anything is done.
test("a connection while the guards are asked keeps the instance from going", async (t) => {
  const slow = gate();
  const early = definePlugin({
    name: "early",
    setup: (host) =>
      void host.hooks.guard("before:standby", ({ instance, signal }) => slow.script(instance, signal), {
        priority: 50,
      }),
  });
  const { instance, clock, kernel, state, said, driver } = await world(t, { plugins: [early] });
  const { id } = await instance();
  const passing = clock.pass(10_000);
  await slow.arrived;
  kernel.set(flow());
  slow.open();
  await passing;
  assert.deepEqual(said(), ["requested ready_for_standby", "cancelled activity"]);
  assert.equal(driver.calls.includes("standby"), false);
  assert.equal(state(id), "Running");
});

// R2, R4, R8: who comes while it goes to sleep has it back at once, whatever the step.
for (const step of ["guards", "driver", "after"] as const) {
  test(`a connection that comes in the middle of a standby (${step}) is not stranded`, async (t) => {
    const slow = gate();
    const late = definePlugin({
      name: "late",
      setup: (host) =>
        void host.hooks.guard("before:standby", ({ instance, signal }) => slow.script(instance, signal), {
          priority: -100,
        }),
    });
    const { instance, clock, kernel, state, said, driver } = await world(
      t,
      step === "guards" ? { plugins: [late] } : {},
    );
    const { id } = await instance();
    if (step === "driver") driver.script.standby = slow.script;
    if (step === "after") {
      // Its event is lost, and it is in the table only after the dump that found nobody.
      driver.script.standby = () => {
        kernel.deaf = true;
        kernel.set(flow());
      };
    }
    const passing = clock.pass(10_000);
    if (step !== "after") {
      await slow.arrived;
      kernel.set(flow());
    }
    await passing;
    await settle(10);
    assert.equal(state(id), "Running");
    assert.equal(said().at(-1), "raced_restored active_inbound_connections");
    assert.equal(driver.calls.includes("restore"), step === "after");
    await clock.pass(60_000);
    assert.equal(state(id), "Running", "the connection is still open");
  });
}

// R10: the restore for who waits is tried again.
test("a restore for who came in the middle is tried again when it fails", async (t) => {
  capturedLogs(t);
  const { instance, clock, kernel, state, driver, said } = await world(t);
  const { id } = await instance();
  driver.script.standby = () => {
    kernel.deaf = true;
    kernel.set(flow());
  };
  let failures = 1;
  driver.script.restore = () => {
    if (failures-- > 0) throw new Error("out of clay");
  };
  const { promise: restored, resolve } = Promise.withResolvers<void>();
  await clock.pass(10_000);
  const check = () => said().at(-1)?.startsWith("raced_restored") ? resolve() : setTimeout(check, 5);
  check();
  await restored;
  assert.equal(state(id), "Running");
});

// I11: a slow standby holds nothing up, and no more than so many are under way.
test("standbys are bounded, and what waits in the queue is cancelled by a connection", async (t) => {
  const { instance, clock, kernel, state, driver, said } = await world(t, { table: { max_concurrent: 2 } });
  const ids: string[] = [];
  for (let i = 0; i < 5; i++) ids.push((await instance(`web-${i}`)).id);
  let [now, most] = [0, 0];
  const open: (() => void)[] = [];
  driver.script.standby = async (_instance, signal) => {
    most = Math.max(most, ++now);
    await new Promise<void>((resolve) => {
      open.push(resolve);
      signal.addEventListener("abort", () => resolve());
    });
    now--;
  };
  await clock.pass(10_000);
  assert.equal(open.length, 2);
  kernel.set(flow({ destination: "10.88.0.6" }));
  await clock.pass(1_000);
  assert.equal(said().at(-1), "cancelled activity");
  while (open.length > 0) {
    for (const resolve of open.splice(0)) resolve();
    await clock.pass(1_000);
  }
  assert.deepEqual(ids.map(state), ["Standby", "Standby", "Standby", "Standby", "Running"]);
  assert.equal(most, 2);
  assert.equal(driver.calls.filter((call) => call === "standby").length, 4, "none is dispatched twice");
});

test("a guard that refuses is asked again after a back-off, and the idle clock stays", async (t) => {
  let busy = true;
  const guarding = definePlugin({
    name: "load",
    setup: (host) =>
      void host.hooks.guard("before:standby", () => {
        if (busy) throw new Veto("cpu_load", "CPU is at 80 %");
      }),
  });
  const { instance, clock, state, said, host } = await world(t, {
    plugins: [guarding],
    table: { retry_backoff: "5s" },
  });
  const { id } = await instance();
  await clock.pass(21_000);
  assert.equal(state(id), "Running");
  assert.equal(said().filter((line) => line === "vetoed cpu_load").length, 3);
  busy = false;
  await clock.pass(5_000);
  assert.equal(state(id), "Standby");
  await host.close();
});

test("a standby that fails is tried again later and later", async (t) => {
  const { instance, clock, state, driver, said } = await world(t, { table: { retry_backoff: "10s" } });
  const { id } = await instance();
  driver.script.standby = () => Promise.reject(new Error("disk full"));
  await clock.pass(10_000 + 10_000 + 20_000 + 39_000);
  assert.equal(said().filter((line) => line === "failed driver_failed").length, 3);
  assert.equal(state(id), "Running");
  delete driver.script.standby;
  await clock.pass(1_000);
  assert.equal(state(id), "Standby");
});

// I11: no new standby once the host closes, and what is under way is waited for.
test("closing cancels what is queued and waits for what is under way", async (t) => {
  const { instance, clock, driver, host, said } = await world(t, { table: { max_concurrent: 1 } });
  for (const name of ["a", "b"]) await instance(name);
  const slow = gate();
  driver.script.standby = slow.script;
  const passing = clock.pass(10_000);
  await slow.arrived;
  await passing;
  const closing = host.close();
  await settle();
  slow.open();
  await closing;
  assert.deepEqual(said().slice(-2), ["cancelled closing", "slept idle"]);
  assert.equal(driver.calls.filter((call) => call === "standby").length, 1);
});

test("an instance that is deleted in the middle of an attempt leaves nothing behind", async (t) => {
  const { instance, clock, kernel, driver, hypervisor, host, said } = await world(t);
  const { id } = await instance();
  const slow = gate();
  driver.script.standby = slow.script;
  const passing = clock.pass(10_000);
  await slow.arrived;
  await Promise.all([hypervisor.delete(id, ORIGIN), passing]);
  await settle();
  assert.deepEqual(said(), ["requested ready_for_standby", "cancelled aborted"]);
  assert.equal(kernel.watched, 0);
  await clock.pass(60_000);
  await host.close();
  assert.equal(clock.timers, 0);
});
