import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import process from "node:process";
import { test } from "node:test";
import { run } from "../../plugins/shared/run.ts";
import { lacking, temporaryFolder, until } from "../helpers.ts";
import { QemuFixture } from "./fixture.ts";
import { demoImage, skipGuest } from "./guest.ts";

const NEVER = new AbortController().signal;
const image = skipGuest ? "" : await demoImage();
const options = { skip: skipGuest, timeout: 540_000 };
const needsRoot = skipGuest || lacking(process.getuid?.() === 0 ? null : "it needs root");

test("start() runs QEMU as somebody who may do nothing else", { ...options, skip: needsRoot }, async (t) => {
  const fixture = new QemuFixture(t, "qemu-microvm", image);
  const instance = fixture.counting();
  const driver = fixture.open();
  await driver.create(instance);
  await driver.start(instance, NEVER);
  const status = readFileSync(`/proc/${fixture.process(instance)!.pid}/status`, "latin1");
  assert.match(status, /^Uid:\t65534\t65534\t65534\t65534$/m);
  assert.match(status, /^Groups:\t *$/m);
  assert.match(status, /^CapEff:\t0{16}$/m);
  assert.match(status, /^NoNewPrivs:\t1$/m);
  assert.match(status, /^Seccomp:\t2$/m);
  // Nor what this host was told in its own environment.
  const environment = readFileSync(`/proc/${fixture.process(instance)!.pid}/environ`, "latin1");
  const names = environment.split("\0").filter(Boolean).map((each) => each.split("=")[0]);
  assert.deepEqual(names.filter((name) => !["LC_ALL", "PATH", "PWD"].includes(name)), []);
  await driver.delete(instance);
});

test("inspect() says how a machine ended that nobody asked to", options, async (t) => {
  const fixture = new QemuFixture(t, "qemu-microvm", image);
  const driver = fixture.open();
  const panicking = fixture.instance("echo c >/proc/sysrq-trigger");
  const told = fixture.changed(panicking);
  await driver.create(panicking);
  await driver.start(panicking, NEVER);
  await told;
  await until("it is stopped", async () => (await driver.inspect(panicking)).state === "Stopped");
  const panic = { state: "Stopped", exit_code: null, exit_message: "the guest's kernel panicked" };
  assert.deepEqual(await driver.inspect(panicking), panic);
  assert.deepEqual(await fixture.open().adopt(panicking), panic);

  const killed = fixture.counting();
  const next = fixture.open();
  await next.create(killed);
  await next.start(killed, NEVER);
  const gone = fixture.changed(killed);
  process.kill(fixture.process(killed)!.pid, "SIGKILL");
  await gone;
  const reading = await next.inspect(killed);
  assert.deepEqual(reading.state === "Stopped" && [reading.exit_code, reading.exit_message], [
    null,
    "QEMU ended: it said nothing",
  ]);
});

test("start() says what QEMU said where it does not run", options, async (t) => {
  const fixture = new QemuFixture(t, "qemu-microvm", image);
  const instance = fixture.instance("true", { vcpus: 1000 });
  const driver = fixture.open();
  await driver.create(instance);
  await assert.rejects(driver.start(instance, NEVER), /^Error: QEMU ended: .*CPUs/);
  assert.equal((await driver.inspect(instance)).state, "Stopped");
  await driver.delete(instance);
  assert.deepEqual(fixture.remains(instance), []);
});

// QEMU stops a guest whose disk cannot be written, rather than tell it.
test(
  "inspect() says that there is no room, and a machine goes on once there is",
  { ...options, skip: needsRoot },
  async (t) => {
    const fixture = new QemuFixture(t, "qemu-microvm", image, { ram_dir: temporaryFolder(t) });
    await run("mount", ["-t", "tmpfs", "-o", "size=6m", "dormouse-test", fixture.dataDir]);
    try {
      const driver = fixture.open();
      const instance = fixture.instance("dd if=/dev/zero of=/data/file bs=1M count=30; sync; exit 5");
      await driver.create(instance);
      await driver.start(instance, NEVER);
      const reading = () => driver.inspect(instance);
      await until("the disk is full", async () => {
        const full = await reading();
        return full.state === "Unknown" && /disk cannot be written/.test(full.error);
      }, 180_000);
      await run("mount", ["-o", "remount,size=100m", fixture.dataDir]);
      await until("it has written all", async () => (await reading()).state === "Stopped", 180_000);
      const ended = await reading();
      assert.equal(ended.state === "Stopped" && ended.exit_code, 5);
    } finally {
      await fixture.fleet!.sweep(new Set());
      await fixture.close();
      await run("umount", ["--lazy", fixture.dataDir]);
    }
  },
);

// R12, F3: what a copy does with the memory that it was made of is nobody else's business.
test("fork() of a sleeping machine leaves the memory of each to itself", options, async (t) => {
  const fixture = new QemuFixture(t, "qemu-microvm", image);
  const source = fixture.counting();
  let driver = fixture.open();
  await fixture.start(driver, source);
  await driver.standby(source, NEVER);
  const at = await fixture.count(source);
  const digest = () => run("sha256sum", [fixture.records(source).ram]);
  const before = await digest();
  const forks = [fixture.counting(), fixture.counting()];
  for (const fork of forks) {
    await driver.fork(source, fork);
    assert.equal((await driver.inspect(fork)).state, "Standby");
    await driver.restore(fork, NEVER);
    await until("the copy counts on", async () => await fixture.count(fork) > at);
  }
  assert.equal(await digest(), before);
  assert.equal(await driver.restore(source, NEVER), "Running");
  await until("the source counts on", async () => await fixture.count(source) > at);

  // The first sleep of a copy, with all of its memory, is nothing that a host waits for which closes.
  fixture.closing.abort(new Error("the host closes"));
  await assert.rejects(driver.standby(forks[0], NEVER), /the host closes/);
  assert.equal((await driver.inspect(forks[0])).state, "Running");
  driver = fixture.open();
  for (const each of [source, ...forks]) {
    await driver.standby(each, NEVER);
    const slept = await fixture.count(each);
    assert.equal(await driver.restore(each, NEVER), "Running");
    await until("it counts on", async () => await fixture.count(each) > slept);
  }
  for (const each of [source, ...forks]) await driver.delete(each);
  assert.deepEqual([source, ...forks].flatMap((each) => fixture.remains(each)), []);
});
