import assert from "node:assert/strict";
import { readdirSync, readlinkSync, renameSync, statSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";
import { execa } from "execa";
import type { Instance, Plugin } from "../../main.ts";
import hypervisorPlugin from "../../plugins/hypervisor/mod.ts";
import { lacksCompression } from "../../plugins/qemu/compress.ts";
import qemuPlugin from "../../plugins/qemu/mod.ts";
import { Records } from "../../plugins/qemu/records.ts";
import { planOf } from "../../plugins/qemu/snapshot-policy.ts";
import { processes } from "../../plugins/shared/proc.ts";
import { run } from "../../plugins/shared/run.ts";
import storePlugin from "../../plugins/store.ts";
import { cleanup, lacking, ROOT, RUNTIME, startWith, temporaryFolder, until } from "../helpers.ts";
import { QemuFixture } from "./fixture.ts";
import { demoImage, skipGuest } from "./guest.ts";

const NEVER = new AbortController().signal;
const skip = skipGuest || lacking(await lacksCompression("zstd"));
const options = { skip, timeout: 900_000 };
const image = skip ? "" : await demoImage();

const compressing = (instance: Instance, level: number): Instance => ({
  ...instance,
  policies: { snapshot_policy: { compression: { enabled: true, algorithm: "zstd", level } } },
});

// R12: one machine, booted once, through all that may happen to a memory that is compressed. R11: what a host that was
// killed has left of it is in nobody's way.
test("a memory is the same for whoever wants it while it is compressed, and after", options, async (t) => {
  const fixture = new QemuFixture(t, "qemu-microvm", image);
  const instance = fixture.counting();
  // The one is not done before somebody comes, the other is soon.
  const [slow, fast] = [compressing(instance, 19), compressing(instance, 1)];
  const records = fixture.records(instance);
  const made = () => readdirSync(records.folder).filter((name) => name.startsWith("ram."));
  const isRead = () => made().some((name) => name.startsWith("ram.zst.")) && compressors(records.ram).length > 0;
  const isCompressed = () => made().join() === "ram.zst" && statSync(records.ram).size === 0;
  /** As if its policy had been changed while it sleeps. */
  const plan = async (sleeper: Instance) => {
    await fixture.fleet!.turn(instance.id, () => records.amend({ plan: planOf(sleeper) }));
    return sleeper;
  };
  const digest = async () => (await run("sha256sum", [records.ram])).slice(0, 64);
  const restored = async (sleeper: Instance, at: number) => {
    assert.equal(await driver.restore(sleeper, NEVER), "Running");
    assert.deepEqual([made(), compressors(records.ram)], [[], []]);
    await until("it counts on", async () => await fixture.count(sleeper) > at);
    assert.ok(await fixture.count(sleeper) < at + 100, "one that booted anew would begin at 1");
  };
  const slept = async () => {
    await driver.standby(instance, NEVER);
    return await fixture.count(instance);
  };
  let driver = fixture.open();
  await fixture.start(driver, instance);
  await until("it counts", async () => await fixture.count(instance) > 0);

  // A fork in the middle of a compression has the memory as it was, and the compression does not begin again before
  // the fork has gone.
  let at = await slept();
  let was = await digest();
  await driver.adopt(await plan(slow));
  await until("it is being compressed", isRead);
  const fork = fixture.counting();
  await driver.fork(slow, fork);
  assert.deepEqual([made(), compressors(records.ram), await digest()], [[], [], was]);
  await driver.restore(fork, NEVER);
  await until("the copy counts on", async () => await fixture.count(fork) > at);
  await driver.delete(fork);
  assert.equal(await digest(), was);

  // A host is killed in the middle of it.
  driver = fixture.open();
  await plan(slow);
  const [command, ...flags] = RUNTIME;
  const args = [...flags, join(ROOT, "test", "qemu", "compress-host.ts"), fixture.dataDir, JSON.stringify(slow)];
  const host = execa(command, args, { stdin: "ignore", reject: false, buffer: false });
  cleanup(t).defer(() => void host.kill("SIGKILL"));
  await until("the host compresses it", isRead, 180_000);
  host.kill("SIGKILL");
  await host;
  await until("its program has ended with it", () => compressors(records.ram).length === 0);
  assert.equal((await driver.adopt(await plan(instance))).state, "Standby");
  await until("what it left is gone", () => made().length === 0);
  assert.equal(await digest(), was);

  // A restore in the middle of a compression.
  await driver.adopt(await plan(slow));
  await until("it is being compressed", isRead);
  await restored(slow, at);

  // Complete, it takes the place of the memory.
  at = await slept();
  was = await digest();
  const { blocks } = statSync(records.ram);
  await driver.adopt(await plan(fast));
  await until("it is compressed", isCompressed, 180_000);
  assert.ok(statSync(records.compressed).blocks < blocks / 2);
  await driver.fork(fast, fork);
  assert.equal(await digest(), was);
  await driver.delete(fork);
  driver = fixture.open();
  await driver.adopt(await plan(fast));
  await until("it is compressed again", isCompressed, 180_000);
  await restored(fast, at);

  // Broken, it is said, and nothing is lost that was not.
  await driver.standby(fast, NEVER);
  at = await fixture.count(fast);
  await until("it is compressed", isCompressed, 180_000);
  renameSync(records.compressed, records.path("kept"));
  writeFileSync(records.compressed, "no such thing");
  await assert.rejects(driver.restore(fast, NEVER), /its memory cannot be decompressed: zstd: .*unsupported format/);
  assert.equal((await driver.inspect(fast)).state, "Standby");
  renameSync(records.path("kept"), records.compressed);
  await restored(fast, at);

  await driver.standby(fast, NEVER);
  await until("it is compressed", isCompressed, 180_000);
  writeFileSync(records.compressed, "no such thing");
  const again = { ...fast, policies: { ...fast.policies, restore_fallback: "start" } };
  assert.equal(await driver.restore(again, NEVER), "Initializing");
  assert.deepEqual(made(), []);
  await driver.delete(again);
  assert.deepEqual([fixture.remains(instance), fixture.remains(fork)], [[], []]);
});

test(
  "a policy applies to the standby, to one that sleeps already, and not to one that says otherwise",
  options,
  async (t) => {
    const folder = temporaryFolder(t);
    const tables = { hypervisor: { default_driver: "qemu-microvm" }, qemu: { accel: "tcg", cgroup_parent: "" } };
    const host = await startWith(t, [storePlugin, hypervisorPlugin, qemuPlugin] as Plugin[], { folder, tables });
    const hypervisor = host.use("hypervisor");
    const origin = { actor: "test", cause: "request" };
    const policy = (level: number) => ({ snapshot_policy: { compression: { enabled: true, level } } });
    const wrong = hypervisor.create({ name: "web", image, ...policy(20) }, origin);
    await assert.rejects(wrong, { code: "invalid_snapshot_policy" });
    const { id } = await hypervisor.create({ name: "web", image }, origin);
    cleanup(t).defer(() => hypervisor.delete(id, origin));
    const { folder: files } = new Records(join(folder, "data", "qemu", "instances", id));
    const kept = () => readdirSync(files).includes("ram.zst");
    await hypervisor.wait(id, "Running", { timeout: 300_000 });
    await hypervisor.standby(id, origin, { compression: { enabled: true } });
    await until("the wish of one standby is granted", kept, 180_000);
    await hypervisor.restore(id, origin);
    await hypervisor.standby(id, origin);
    assert.equal(kept(), false);
    await hypervisor.update(id, policy(1), origin);
    await until("the new policy is followed", kept, 180_000);
  },
);

/** The processes of `zstd` that have a file open. */
function compressors(file: string): number[] {
  const pids = processes().map(({ pid }) => pid);
  return pids.filter((pid) => link(`/proc/${pid}/exe`).endsWith("/zstd") && link(`/proc/${pid}/fd/0`) === file);
}

function link(path: string): string {
  try {
    return readlinkSync(path);
  } catch {
    return ""; // it has ended
  }
}
