import assert from "node:assert/strict";
import process from "node:process";
import { test } from "node:test";
import { timeLeft } from "../../plugins/qemu/ready.ts";
import { isAlive, processStat } from "../../plugins/shared/proc.ts";
import { capturedLogs } from "../helpers.ts";
import { QemuFixture } from "./fixture.ts";
import { demoImage, skipGuest, skipQemu } from "./guest.ts";
import { idleImage } from "./idle.ts";

const NEVER = new AbortController().signal;
const options = { skip: skipQemu, timeout: 540_000 };

test("a guest that is not ready in time is ended, and that is told", options, async (t) => {
  const logs = capturedLogs(t);
  const fixture = new QemuFixture(t, "qemu-microvm", idleImage(t), { boot_timeout: 1_000 });
  const driver = fixture.open();
  const instance = fixture.instance();
  await driver.create(instance);
  const told = fixture.changed(instance);
  assert.equal(await driver.start(instance, NEVER), "Initializing");
  const main = fixture.process(instance)!;
  await told;
  const ended = { state: "Stopped", exit_code: null, exit_message: "it was not ready within 1s" };
  assert.deepEqual(await driver.inspect(instance), ended);
  assert.ok(!isAlive(main));
  assert.deepEqual(logs, [`warning: Ending ${instance.name}: it was not ready within 1s`]);
  assert.deepEqual(await fixture.open().adopt(instance), ended);
});

// Its kernel does not hear the first press of the power button, nor its agent the first question.
test("stop() asks a guest that still boots until it hears", { ...options, skip: skipGuest }, async (t) => {
  const fixture = new QemuFixture(t, "qemu-microvm", await demoImage(), { grace: 180_000 });
  const driver = fixture.open();
  const instance = fixture.counting();
  await driver.create(instance);
  assert.equal(await driver.start(instance, NEVER), "Initializing");
  assert.deepEqual(await driver.stop(instance, NEVER), {
    exit_code: null,
    exit_message: "the guest powered off",
  });
  await driver.delete(instance);
});

test("the time of a guest goes on where no host is there to see it", options, async (t) => {
  const fixture = new QemuFixture(t, "qemu-microvm", idleImage(t), { boot_timeout: 1_000 });
  const instance = fixture.instance();
  const first = fixture.open();
  await first.create(instance);
  await first.start(instance, NEVER);
  await fixture.fleet![Symbol.asyncDispose]();
  const told = fixture.changed(instance);
  const next = fixture.open();
  assert.equal((await next.adopt(instance)).state, "Initializing");
  await told;
  const reading = await next.inspect(instance);
  assert.equal(reading.state === "Stopped" && reading.exit_message, "it was not ready within 1s");
});

test("timeLeft() counts from the start of the machine, and leaves a new host time to ask", () => {
  const [own, oldest] = [process.pid, 1].map((pid) => processStat(pid)!);
  const day = 86_400_000;
  assert.equal(timeLeft(own, 0), Infinity);
  assert.ok(timeLeft(own, day) < day && timeLeft(own, day) > day - 3_600_000);
  assert.ok(timeLeft(oldest, day) < timeLeft(own, day));
  assert.equal(timeLeft({ pid: own.pid, started: 0 }, 1_000), 1_000);
  assert.equal(timeLeft({ pid: own.pid, started: -1e9 }, 300_000), 10_000);
});
