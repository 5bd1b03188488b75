import assert from "node:assert/strict";
import { test } from "node:test";
import { settle } from "../clock.ts";
import { gate, ScriptedDriver } from "../hypervisor/scripted.ts";
import { flow, world } from "./world.ts";

test("stats() counts those in use, those that count down, and the flows", async (t) => {
  const { host, instance, kernel, clock, hypervisor } = await world(t);
  const stats = () => host.use("conntrack-standby").stats();
  assert.deepEqual(stats(), { active: 0, idle: 0, flows: 0, queued: 0, in_flight: 0 });
  await instance("used");
  await instance("idle");
  await instance("without", { enabled: false });
  kernel.set(flow());
  kernel.set(flow({ source_port: 5, state: "SYN_SENT" }));
  await settle();
  assert.deepEqual(stats(), { active: 1, idle: 1, flows: 2, queued: 0, in_flight: 0 });
  await clock.pass(10_000);
  assert.equal(hypervisor.resolve("idle").state, "Standby");
  assert.deepEqual(stats(), { active: 1, idle: 0, flows: 2, queued: 0, in_flight: 0 }, "one that sleeps is neither");
});

test("stats() counts those that wait for their turn to sleep, and those on their way", async (t) => {
  const driver = new ScriptedDriver();
  const { arrived, open, script } = gate();
  driver.script.standby = script;
  const { host, instance, clock, state } = await world(t, { driver, table: { max_concurrent: 1 } });
  const [a, b] = [await instance("a"), await instance("b")];
  await clock.pass(10_000);
  await arrived;
  const { queued, in_flight } = host.use("conntrack-standby").stats();
  assert.deepEqual([queued, in_flight], [1, 1]);
  open();
  await clock.pass(1_000);
  assert.deepEqual([state(a.id), state(b.id)], ["Standby", "Standby"]);
  assert.deepEqual(host.use("conntrack-standby").stats(), { active: 0, idle: 0, flows: 0, queued: 0, in_flight: 0 });
});
