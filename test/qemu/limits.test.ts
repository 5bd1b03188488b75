import assert from "node:assert/strict";
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { test } from "node:test";
import type { Instance } from "../../main.ts";
import { limitsOf } from "../../plugins/qemu/limits.ts";
import { Hierarchy, ownerOf } from "../../plugins/shared/hierarchy.ts";
import { isAlive } from "../../plugins/shared/proc.ts";
import { lacking, temporaryFolder } from "../helpers.ts";
import { QemuFixture } from "./fixture.ts";
import { skipQemu } from "./guest.ts";
import { idleImage } from "./idle.ts";

const NEVER = new AbortController().signal;
const MIB = 2 ** 20;
const skip = skipQemu || lacking(process.getuid?.() === 0 ? null : "it needs root");

test("limitsOf() leaves room for QEMU itself", () => {
  const kvm = limitsOf({ vcpus: 2, bytes: 512 * MIB, accel: "kvm" });
  assert.deepEqual(kvm, { memory_bytes: (512 + 96 + 16 + 8) * MIB, cpus: 2.5, tasks: 130 });
  assert.equal(limitsOf({ vcpus: 2, bytes: 512 * MIB, accel: "tcg" }).memory_bytes, kvm.memory_bytes + 256 * MIB);
});

/** The folders of the instance's group, in each hierarchy. */
function groups({ dataDir }: QemuFixture, { id }: Instance): string[] {
  const owner = ownerOf(join(dataDir, "qemu", "instances"));
  const mounts = readFileSync("/proc/self/mountinfo", "utf8").split("\n").filter((line) => / - cgroup2? /.test(line));
  return mounts.map((line) => join(line.split(" ")[4], "dormouse-test", owner, id)).filter((path) => existsSync(path));
}

/** What of the group's files that may say it says it. */
function limit(folders: string[], ...names: string[]): string | undefined {
  const file = folders.flatMap((folder) => names.map((name) => join(folder, name))).find((path) => existsSync(path));
  return file && readFileSync(file, "latin1").trim();
}

test("start() puts QEMU into a cgroup with limits, which goes when the machine ends", { skip }, async (t) => {
  const image = idleImage(t, { agent: false, vcpus: 2 });
  const fixture = new QemuFixture(t, "qemu-microvm", image);
  const driver = fixture.open();
  const instance = fixture.instance();
  await driver.create(instance);
  await driver.start(instance, NEVER);
  const main = fixture.process(instance)!;
  const own = readFileSync(`/proc/${main.pid}/cgroup`, "latin1");
  const folders = groups(fixture, instance);
  assert.ok(folders.length > 0, "there is none");
  for (const folder of folders) {
    assert.deepEqual(readFileSync(join(folder, "cgroup.procs"), "latin1"), `${main.pid}\n`);
  }
  assert.match(own, new RegExp(`/dormouse-test/[0-9a-f]{12}/${instance.id}$`, "m"));
  const { memory_bytes, tasks } = limitsOf({ vcpus: 2, bytes: 64 * MIB, accel: "tcg" });
  const memory = limit(folders, "memory.max", "memory.limit_in_bytes");
  const cpu = limit(folders, "cpu.max", "cpu.cfs_quota_us");
  const pids = limit(folders, "pids.max");
  t.diagnostic(`limits: memory ${memory}, cpu ${cpu}, pids ${pids}`);
  if (memory !== undefined) assert.equal(Number(memory), memory_bytes);
  if (cpu !== undefined) assert.match(cpu, /^250000( 100000)?$/);
  if (pids !== undefined) assert.equal(Number(pids), tasks);

  // The next host finds it where it is; and of the group of one that ended meanwhile nothing is left.
  const next = fixture.open();
  assert.equal((await next.adopt(instance)).state, "Running");
  assert.deepEqual(groups(fixture, instance), folders);
  await next.standby(instance, NEVER);
  assert.deepEqual(groups(fixture, instance), folders, "its memory is still counted there");
  assert.equal(await next.restore(instance, NEVER), "Running");
  assert.match(readFileSync(`/proc/${fixture.process(instance)!.pid}/cgroup`, "latin1"), new RegExp(instance.id));
  const told = fixture.changed(instance);
  process.kill(fixture.process(instance)!.pid, "SIGKILL");
  await told;
  assert.equal((await next.inspect(instance)).state, "Stopped");
  assert.deepEqual(groups(fixture, instance), []);

  await next.start(instance, NEVER);
  assert.deepEqual(groups(fixture, instance), folders);
  await next.stop(instance, AbortSignal.abort());
  assert.deepEqual(groups(fixture, instance), []);
  await next.start(instance, NEVER);
  await next.delete(instance);
  assert.deepEqual(groups(fixture, instance), []);
  assert.deepEqual(fixture.remains(instance), []);
});

test("sweep() ends what is in a cgroup of nobody's, and leaves others' alone", { skip }, async (t) => {
  const fixture = new QemuFixture(t, "qemu-microvm", idleImage(t, { agent: false }));
  const driver = fixture.open();
  const [kept, stray] = [fixture.instance(), fixture.instance()];
  for (const each of [kept, stray]) {
    await driver.create(each);
    await driver.start(each, NEVER);
  }
  const lost = fixture.process(stray)!;
  await fixture.records(stray).erase();
  // As the driver of processes has them on the same data_dir.
  const other = Hierarchy.find("dormouse-test", ownerOf(temporaryFolder(t)), { root: true }) as Hierarchy;
  other.group("process").make({ memory_bytes: null, cpus: null });
  assert.ok(!fixture.fleet!.limits.ids().has("process"));
  assert.deepEqual(await fixture.fleet!.sweep(new Set([kept.id])), [stray.id]);
  assert.ok(!isAlive(lost));
  assert.deepEqual(groups(fixture, stray), []);
  assert.equal((await driver.inspect(kept)).state, "Running");
  assert.deepEqual([...other.ids()], ["process"]);
  await other.group("process").remove();
  other.tidy();
  await driver.delete(kept);
});

test("a machine that is left without a group of its own runs all the same", { skip: skipQemu }, async (t) => {
  const fixture = new QemuFixture(t, "qemu", idleImage(t, { agent: false }), { cgroup_parent: "" });
  const driver = fixture.open();
  const instance = fixture.instance();
  await driver.create(instance);
  assert.equal(await driver.start(instance, NEVER), "Running");
  assert.deepEqual(groups(fixture, instance), []);
  assert.deepEqual(fixture.records(instance).launch()!.joins, []);
  await driver.delete(instance);
});
