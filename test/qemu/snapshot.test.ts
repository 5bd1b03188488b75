import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { existsSync, readFileSync } from "node:fs";
import { connect } from "node:net";
import { join } from "node:path";
import { test } from "node:test";
import { setImmediate } from "node:timers/promises";
import { execa } from "execa";
import { Qmp } from "../../plugins/qemu/qmp.ts";
import { Records } from "../../plugins/qemu/records.ts";
import { saveState } from "../../plugins/qemu/snapshot.ts";
import { clockOffset } from "../../plugins/qemu/tasks.ts";
import { temporaryFolder, until } from "../helpers.ts";
import { QemuFixture } from "./fixture.ts";
import { demoImage, skipGuest } from "./guest.ts";
import { say, scripted } from "./scripted.ts";

const NEVER = new AbortController().signal;
const image = skipGuest ? "" : await demoImage();
const options = { skip: skipGuest, timeout: 900_000 };

// R10: whoever has it next pays what was owed to it, and a pause is a sleep to its clock.
test("a guest is told what time it is, by the next host where one died before", options, async (t) => {
  const fixture = new QemuFixture(t, "qemu-microvm", image);
  const instance = fixture.counting();
  let driver = fixture.open();
  await fixture.start(driver, instance);
  const off = async () => {
    const { offset, uncertainty } = await clockOffset(fixture.fleet!.vm(instance.id).link!.agent, { timeout: 60_000 });
    return Math.abs(offset) - uncertainty;
  };
  const delayed = async () => {
    const { agent } = fixture.fleet!.vm(instance.id).link!;
    await agent.call("guest-set-time", { time: (Date.now() - 60_000) * 1e6 }, { timeout: 60_000 });
  };
  await delayed();
  fixture.records(instance).mark("stale");
  await fixture.close();
  driver = fixture.open();
  assert.equal((await driver.adopt(instance)).state, "Running");
  const paid = () => until("it was told", () => !fixture.records(instance).isMarked("stale"), 180_000);
  await paid();
  assert.ok(await off() < 100);

  await delayed();
  await driver.pause(instance);
  await driver.resume(instance);
  await paid();
  assert.ok(await off() < 100);

  await delayed();
  const calledBack = new AbortController();
  const sleep = assert.rejects(driver.standby(instance, calledBack.signal), /somebody came/);
  const { records } = fixture.fleet!.vm(instance.id);
  while (!existsSync(records.path("stale"))) await setImmediate();
  calledBack.abort(new Error("somebody came"));
  await sleep;
  assert.equal((await driver.inspect(instance)).state, "Running");
  await paid();
  assert.ok(await off() < 100);

  await delayed();
  // An agent that is away for longer than anybody waits for it.
  const away = "pidof qemu-ga >/run/ga; kill -STOP $(cat /run/ga); echo away >/dev/console; sleep 20";
  const arg = ["-c", `sleep 1; ${away}; kill -CONT $(cat /run/ga)`];
  await fixture.fleet!.vm(instance.id).link!.agent.call("guest-exec", { path: "/bin/sh", arg }, { timeout: 60_000 });
  const { log } = fixture.records(instance);
  await until("the agent is away", () => readFileSync(log, "latin1").includes("away"), 180_000);
  await driver.standby(instance, NEVER);
  assert.equal(await driver.restore(instance, NEVER), "Running");
  assert.ok(fixture.records(instance).isMarked("stale"));
  await paid();
  assert.ok(await off() < 100);
  await driver.delete(instance);
});

// It may be a QEMU that a guest has taken over.
test("saveState() takes no more than a state can be", async (t) => {
  const records = new Records(join(temporaryFolder(t), "one"));
  records.make(null);
  let sent = 0;
  let status = "active";
  const path = await scripted(t, {
    greet: (socket) => say(socket, { QMP: { version: { qemu: { major: 7, minor: 2, micro: 0 } }, capabilities: [] } }),
    answer(socket, { execute, id }) {
      say(socket, { return: execute === "query-migrate" ? { status } : {}, id });
      if (execute !== "migrate") return;
      const out = connect(records.path("out.sock"));
      const chunk = Buffer.alloc(1 << 20);
      const more = () => {
        while (!out.destroyed && out.write(chunk)) sent += chunk.length;
        sent += chunk.length;
      };
      out.on("connect", more).on("drain", more).on("error", () => {}).on("close", () => status = "failed");
    },
  });
  using qmp = await Qmp.connect(path);
  await assert.rejects(
    saveState(qmp, records, null, { full: false, signal: NEVER }),
    /^Error: QEMU sends a state of more than 67108864 bytes$/,
  );
  assert.ok(sent < 128 * 1024 * 1024, `${sent}`);
  assert.ok(!existsSync(records.path("state.tmp")));
});

// R10: it stays asleep with its state as it was, unless it is to start anew.
test("restore() starts a machine anew whose state is broken only where its policy says so", options, async (t) => {
  const fixture = new QemuFixture(t, "qemu-microvm", image);
  const instance = fixture.counting();
  const driver = fixture.open();
  await fixture.start(driver, instance);
  await driver.standby(instance, NEVER);
  await execa("truncate", ["--size=1000", fixture.records(instance).path("state")]);
  for (let round = 0; round < 2; round++) {
    await assert.rejects(driver.restore(instance, NEVER), /^Unrestorable: QEMU ended: .*qemu-system-x86_64: /);
    assert.equal((await driver.inspect(instance)).state, "Standby");
  }
  const policies = { restore_fallback: "start" };
  assert.equal(await driver.restore({ ...instance, policies }, NEVER), "Initializing");
  await until("it runs", async () => (await driver.inspect(instance)).state === "Running", 180_000);
  await driver.delete(instance);
  assert.deepEqual(fixture.remains(instance), []);
});
