import assert from "node:assert/strict";
import { test } from "node:test";
import type { Feature, Plugin } from "../../main.ts";
import { healthPlugin } from "../../plugins/health/mod.ts";
import { restartPlugin } from "../../plugins/restart/mod.ts";
import { ManualClock, settle } from "../clock.ts";
import { ScriptedDriver } from "../hypervisor/scripted.ts";
import { PERSON, type World, world } from "./world.ts";

async function crash({ driver, hypervisor }: World, id: string): Promise<void> {
  driver.machines.set(id, { state: "Stopped", exit_code: 1, exit_message: "crashed" });
  hypervisor.changed(id, "exit");
  await settle();
}

test("the plugin restart leaves alone what was stopped by lazy, and what crashes under a lease it starts", async (t) => {
  const clock = new ManualClock();
  const made = await world(t, { clock, plugins: [restartPlugin(clock, () => 0.5)] as Plugin[] });
  const { hypervisor, state, acquire, renew, release, events } = made;
  const { id } = await hypervisor.create({
    name: "web",
    image: "any",
    lazy: { enabled: true, idle_stop: "10s" },
    restart_policy: { policy: "always" },
  }, PERSON);
  await clock.pass(10_000);
  assert.equal(state("web"), "Stopped");
  await clock.pass(3_600_000);
  assert.equal(state("web"), "Stopped");

  // The start of an acquire is one that somebody wants to last.
  const { lease } = await acquire("web", "1h");
  await crash(made, id);
  await clock.pass(60_000);
  assert.deepEqual([state("web"), events.at(-1)!.actor], ["Running", "restart"]);
  await renew("web", lease);
  await clock.pass(3_000_000);
  assert.equal(state("web"), "Running");
  await release("web", lease);
  await clock.pass(3_600_000);
  assert.equal(state("web"), "Stopped");
});

test("an acquire waits for the health check of the instance, and gives no lease while it fails", async (t) => {
  let healthy = false;
  class Probed extends ScriptedDriver {
    exec = async () => ({ exit_code: healthy ? 0 : 1, stdout: "", stderr: "", timed_out: false, truncated: false });
  }
  const [clock, driver] = [new ManualClock(), new Probed()];
  (driver.features as Set<Feature>).add("exec");
  const made = await world(t, { clock, driver, plugins: [healthPlugin(clock, () => 0)] as Plugin[] });
  const { hypervisor, shown, acquire, lazy, said } = made;
  await hypervisor.create({
    name: "web",
    image: "any",
    lazy: { enabled: true, idle_stop: "10s", start_timeout: "30s" },
    health_check: { type: "exec", exec: { command: ["check"] }, interval: "1h", timeout: "1s" },
  }, PERSON);
  await clock.pass(10_000);

  const refused = assert.rejects(acquire("web"), { code: "lazy_start_timeout" });
  await clock.pass(30_000);
  await refused;
  assert.deepEqual([said().at(-1), lazy.stats().leases], ["lazy_start_failed", 0]);
  await clock.pass(10_000);
  assert.equal(shown("web").lifecycle_state, "failed", "nobody has leased it, so it is stopped");

  const waiting = acquire("web");
  await clock.pass(2_000);
  assert.equal(shown("web").lifecycle_state, "starting");
  healthy = true;
  await clock.pass(1_000);
  assert.equal((await waiting).started, true);
});
