import assert from "node:assert/strict";
import { test } from "node:test";
import { world } from "./world.ts";

test("the field is kept with its defaults and in Go's spelling", async (t) => {
  const { instance } = await world(t);
  for (
    const [given, kept] of [
      [{ enabled: true }, { enabled: true, idle_stop: "5m0s", start_timeout: "1m0s", via: "stop" }],
      [{ enabled: true, idle_stop: " 90s ", start_timeout: "1500ms", via: "standby" }, {
        enabled: true,
        idle_stop: "1m30s",
        start_timeout: "1.5s",
        via: "standby",
      }],
      [{ enabled: false, idle_stop: "5m", via: "stop" }, { enabled: false }],
      [{ idle_stop: "5m" }, { enabled: false }],
    ] as const
  ) {
    const name = `i${Math.random().toString(36).slice(2)}`;
    assert.deepEqual((await instance(name, given)).policies.lazy, kept, JSON.stringify(given));
  }
});

test("a policy that cannot work is refused with invalid_lazy", async (t) => {
  const { instance, driver } = await world(t);
  for (
    const policy of [
      { enabled: true, idle_stop: "0s" },
      { enabled: true, idle_stop: "soon" },
      { enabled: true, start_timeout: "-1s" },
      { enabled: true, via: "pause" },
      { enabled: true, idle: "5m" },
      { enabled: "yes" },
      true,
    ]
  ) {
    await assert.rejects(instance("web", policy), { code: "invalid_lazy" }, JSON.stringify(policy));
  }
  (driver.features as Set<string>).delete("standby");
  await assert.rejects(instance("web", { enabled: true, via: "standby" }), {
    code: "invalid_lazy",
    message: 'Wrong value of "lazy.via": driver "scripted" has no standby',
  });
});

test("null clears the policy, and with it the leases; what was counted stays with the instance", async (t) => {
  const { instance, hypervisor, acquire, renew, shown, state, clock, lazy } = await world(t);
  const { id } = await instance();
  const { lease } = await acquire("web");
  await hypervisor.update(id, { lazy: null }, { actor: "api", cause: "request" });
  assert.deepEqual([shown("web").lifecycle_state, shown("web").lifecycle_metrics], [null, null]);
  assert.equal(hypervisor.find(id)!.policies.lazy, undefined);
  await assert.rejects(renew("web", lease), { code: "not_lazy" });
  await assert.rejects(acquire("web"), { code: "not_lazy" });
  await clock.pass(1_000_000);
  assert.equal(state("web"), "Running");
  assert.equal(Object.values(lazy.stats().states).reduce((sum, each) => sum + each), 0);

  await hypervisor.update(id, { lazy: { enabled: true, idle_stop: "10s" } }, { actor: "api", cause: "request" });
  await assert.rejects(renew("web", lease), { code: "lease_not_found" });
  assert.equal(shown("web").lifecycle_metrics.leases_granted, 1);
  await clock.pass(9_999);
  assert.equal(state("web"), "Running", "the idle window begins with the policy");
  await clock.pass(1);
  assert.equal(state("web"), "Stopped");
});
