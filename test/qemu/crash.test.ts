import assert from "node:assert/strict";
import { readFileSync, renameSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { createInterface } from "node:readline";
import { test } from "node:test";
import { execa } from "execa";
import type { Instance } from "../../main.ts";
import { clockOffset } from "../../plugins/qemu/tasks.ts";
import { delay } from "../../plugins/shared/async.ts";
import { ROOT, RUNTIME, temporaryFolder, until } from "../helpers.ts";
import { QemuFixture } from "./fixture.ts";
import { demoImage, skipGuest } from "./guest.ts";

const NEVER = new AbortController().signal;
const image = skipGuest ? "" : await demoImage();

/** When hosts are killed: so many milliseconds after they began with something. */
const MOMENTS: [string, number[]][] = [
  ["start", [0, 40]],
  ["standby", [0, 6, 12, 20]],
  ["restore", [0, 40, 70, 90]],
  ["stop", [5]],
  ["delete", [0]],
];

/** Those that leave a machine which the next host can be killed over. */
const LASTING = ["standby", "restore"];

for (const [step, moments] of MOMENTS) {
  // R11: and what a standby that was cut has left is in nobody's way.
  const title = `adopt() finds a running machine, a whole snapshot or nothing after a host was killed in ${step}()`;
  test(title, { skip: skipGuest, timeout: 900_000 }, async (t) => {
    const fixture = new QemuFixture(t, "qemu-microvm", image);
    const instance = fixture.counting();
    const lasts = LASTING.includes(step);
    for (const [index, ms] of moments.entries()) {
      await killedHost(fixture, instance, { step, ms, only: lasts && index > 0 ? LASTING : [] });
      const driver = fixture.open();
      const owed = fixture.records(instance).isMarked("stale");
      const reading = await driver.adopt(instance);
      const context = `killed ${ms} ms into ${step}(): ${JSON.stringify(reading)}`;
      assert.ok(["Initializing", "Running", "Standby", "Stopped"].includes(reading.state), context);
      if (lasts) {
        const before = await fixture.count(instance);
        assert.ok(before > 0, context);
        if (reading.state === "Standby") await driver.restore(instance, NEVER);
        assert.equal((await driver.inspect(instance)).state, "Running", context);
        await until(`it counts on from ${before}, ${context}`, async () => await fixture.count(instance) > before);
        const boots = readFileSync(fixture.records(instance).log, "latin1").match(/^demo guest \S+ is up/gm);
        assert.equal(boots?.length, 1, context);
        assert.ok(!fixture.records(instance).has("state"), context);
        // R10: of the time in which it stood still and nobody was there it knows too.
        await until("it is told what time it is", () => !fixture.records(instance).isMarked("stale"), 180_000);
        const { offset, uncertainty } = await clockOffset(fixture.fleet!.vm(instance.id).link!.agent, {
          timeout: 60_000,
        });
        if (owed) assert.ok(Math.abs(offset) - uncertainty < 100, `its clock is ${offset} ms off: ${context}`);
        if (index + 1 < moments.length) {
          await fixture.close();
          continue;
        }
      }
      await driver.delete(instance);
      assert.deepEqual(fixture.remains(instance), [], context);
    }
  });
}

// A snapshot of memory that ran on would be two moments in one machine.
test(
  "restore() refuses a snapshot whose memory was not on disk when the machine was restarted",
  { skip: skipGuest },
  async (t) => {
    const fixture = new QemuFixture(t, "qemu-microvm", image, { ram_dir: temporaryFolder(t) });
    const instance = fixture.counting();
    const driver = fixture.open();
    await fixture.start(driver, instance);
    await driver.standby(instance, NEVER);
    // Its own word that the memory is on disk must not come after ours.
    await fixture.close();
    const file = fixture.records(instance).path("snapshot.json");
    const write = (snapshot: unknown) => execa("tee", [file], { input: JSON.stringify(snapshot) });
    await write({ boot: "another", durable: false, full: false });
    const next = fixture.open();
    assert.equal((await next.adopt(instance)).state, "Standby");
    await assert.rejects(next.restore(instance, NEVER), /restarted before/);
    assert.equal((await next.inspect(instance)).state, "Standby");
    await write({ boot: "another", durable: true, full: false });
    // As a ram_dir that is itself memory loses it.
    const { ram } = fixture.fleet!.vm(instance.id).records;
    renameSync(ram, `${ram}.lost`);
    await assert.rejects(next.restore(instance, NEVER), /its memory is not there any more/);
    assert.equal((await next.inspect(instance)).state, "Standby");
    renameSync(`${ram}.lost`, ram);
    assert.equal(await next.restore(instance, NEVER), "Running");
    await next.delete(instance);
  },
);

/** Has a host take the instance through its life, or through the steps `only`, and kills it `ms` after it began `step`. */
async function killedHost(
  fixture: QemuFixture,
  instance: Instance,
  { step, ms, only }: { step: string; ms: number; only: string[] },
): Promise<void> {
  const [command, ...flags] = RUNTIME;
  const program = join(ROOT, "test", "qemu", "host.ts");
  const args = [...flags, program, fixture.dataDir, JSON.stringify(instance), only.join()];
  const host = execa(command, args, { stdin: "ignore", reject: false, buffer: false });
  const lines = createInterface({ input: host.nodeChildProcess.stdout! });
  try {
    for await (const line of lines) if (line === step) break;
    await delay(ms);
  } finally {
    process.kill(host.pid!, "SIGKILL");
    await host;
    lines.close();
    fixture.process(instance);
  }
}
