import assert from "node:assert/strict";
import { test } from "node:test";
import { execa } from "execa";
import { until } from "../helpers.ts";
import { QemuFixture } from "./fixture.ts";
import { demoImage, skipGuest } from "./guest.ts";

const NEVER = new AbortController().signal;
const image = skipGuest ? "" : await demoImage();
const options = { skip: skipGuest, timeout: 300_000 };

// R10: it stays asleep with its state as it was, unless it is to start anew.
test("restore() starts a machine anew whose state is broken only where its policy says so", options, async (t) => {
  const fixture = new QemuFixture(t, "qemu-microvm", image);
  const instance = fixture.counting();
  const driver = fixture.open();
  await fixture.start(driver, instance);
  await driver.standby(instance, NEVER);
  await execa("truncate", ["--size=1000", fixture.records(instance).path("state")]);
  for (let round = 0; round < 2; round++) {
    await assert.rejects(driver.restore(instance, NEVER), /^Error: QEMU ended: .*qemu-system-x86_64: /);
    assert.equal((await driver.inspect(instance)).state, "Standby");
  }
  const policies = { restore_fallback: "start" };
  assert.equal(await driver.restore({ ...instance, policies }, NEVER), "Initializing");
  await until("it runs", async () => (await driver.inspect(instance)).state === "Running", 60_000);
  await driver.delete(instance);
  assert.deepEqual(fixture.remains(instance), []);
});
