import assert from "node:assert/strict";
import { test } from "node:test";
import { definePlugin, type StandbyRequest } from "../../main.ts";
import { normalise, SnapshotPolicy } from "../../plugins/qemu/snapshot-policy.ts";
import { ORIGIN, registryHost } from "./scripted.ts";

/** The field as the plugin `qemu` has it, of a machine. */
const snapshots = definePlugin({
  name: "snapshots",
  requires: ["hypervisor"],
  setup({ use, defer }) {
    const extension = use("hypervisor").extend({
      field: "snapshot_policy",
      code: "invalid_snapshot_policy",
      schema: SnapshotPolicy,
      normalise: (policy) => normalise(policy, { driver: "qemu" }, { zstd: null, lz4: "it is not there" }),
    });
    defer(() => extension[Symbol.dispose]());
  },
});

test("standby() shows its driver the policy with what this one has of its own, and keeps the policy", async (t) => {
  const { hypervisor, driver } = await registryHost(t, { plugins: [snapshots] });
  const kept = { compression: { enabled: true, algorithm: "zstd", level: 3 }, standby_compression_delay: "1m0s" };
  const cases: [StandbyRequest | undefined, unknown][] = [
    [undefined, kept],
    [{}, kept],
    [{ compression: { enabled: false } }, { ...kept, compression: { enabled: false } }],
    [{ compression_delay: "90s" }, { ...kept, standby_compression_delay: "1m30s" }],
    [{ compression: { enabled: true } }, { ...kept, compression: { enabled: true, algorithm: "zstd", level: 1 } }],
  ];
  const body = { name: "web", image: "any", snapshot_policy: kept };
  const { id } = await hypervisor.create(body, ORIGIN);
  for (const [request, expected] of cases) {
    let seen: unknown;
    driver.script.standby = ({ policies }) => void (seen = policies.snapshot_policy);
    assert.equal((await hypervisor.standby(id, ORIGIN, request)).state, "Standby");
    assert.deepEqual(seen, expected, JSON.stringify(request));
    assert.deepEqual(hypervisor.find(id)!.policies.snapshot_policy, kept);
    await hypervisor.restore(id, ORIGIN);
  }
});

test("standby() refuses a compression that its field's owner refuses, before anything happens", async (t) => {
  const { hypervisor, driver } = await registryHost(t, { plugins: [snapshots] });
  const { id } = await hypervisor.create({ name: "web", image: "any" }, ORIGIN);
  const cases: [NonNullable<StandbyRequest["compression"]>, string][] = [
    [{ enabled: true, level: 20 }, 'Wrong value of "compression.level": expected 1 to 19 for zstd, found 20'],
    [
      { enabled: true, algorithm: "lz4" },
      'Wrong value of "compression.algorithm": lz4 cannot be used here: it is not there',
    ],
  ];
  for (const [compression, message] of cases) {
    await assert.rejects(hypervisor.standby(id, ORIGIN, { compression }), {
      code: "invalid_snapshot_compression",
      message,
    });
  }
  assert.equal(driver.calls.includes("standby"), false);
  assert.equal(hypervisor.find(id)!.state, "Running");
});

test("standby() refuses a compression where nobody compresses, and takes the wish for none", async (t) => {
  const { hypervisor } = await registryHost(t);
  const { id } = await hypervisor.create({ name: "web", image: "any" }, ORIGIN);
  await assert.rejects(hypervisor.standby(id, ORIGIN, { compression: { enabled: true } }), { code: "feature_off" });
  const none = { compression: { enabled: false }, compression_delay: "30s" };
  assert.equal((await hypervisor.standby(id, ORIGIN, none)).state, "Standby");
});
