import assert from "node:assert/strict";
import { test } from "node:test";
import { DormouseError } from "../../main.ts";
import { QemuFixture } from "./fixture.ts";
import { skipQemu } from "./guest.ts";
import { idleImage } from "./idle.ts";

const NEVER = new AbortController().signal;

// S2: without a code it would be an error in Dormouse itself, of which a client is told nothing.
test("exec() and stat() say whose guest does not answer", { skip: skipQemu, timeout: 300_000 }, async (t) => {
  const fixture = new QemuFixture(t, "qemu-microvm", idleImage(t));
  const driver = fixture.open();
  const instance = fixture.instance();
  await driver.create(instance);
  await driver.start(instance, NEVER);
  fixture.records(instance).mark("ready");
  const request = { command: ["true"], max_output: 1024 };
  const failed = (message: RegExp) => (error: unknown) => {
    assert.ok(error instanceof DormouseError, String(error));
    assert.equal(error.code, "driver_failed");
    assert.match(error.message, message);
    return true;
  };
  await assert.rejects(
    driver.exec(instance, { ...request, timeout_ms: 2_000 }),
    failed(/^Cannot exec in instance "test-\w+": Guest agent .* ran past its deadline/),
  );
  const looking = driver.stat(instance, "/", false);
  looking.catch(() => {}); // seen below
  const controller = new AbortController();
  const reason = new Error("its client is gone");
  const running = driver.exec(instance, { ...request, timeout_ms: 20_000, signal: controller.signal });
  controller.abort(reason);
  await assert.rejects(running, (error) => error === reason);
  await driver.delete(instance);
  await assert.rejects(looking, failed(/^Cannot look into instance "test-\w+": /));
});
