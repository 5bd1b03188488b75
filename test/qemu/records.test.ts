import assert from "node:assert/strict";
import { appendFileSync, existsSync, truncateSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { test, type TestContext } from "node:test";
import { lastLine } from "../../plugins/qemu/launch.ts";
import { Records } from "../../plugins/qemu/records.ts";
import { cleanup, lacking, temporaryFolder } from "../helpers.ts";
import { fleetOf, OPTIONS } from "./fixture.ts";

function recordsOf(t: TestContext): Records {
  const records = new Records(join(temporaryFolder(t), "one"));
  records.make(null);
  return records;
}

test("Records.exitCode() reads what a guest wrote, however much that is", (t) => {
  const records = recordsOf(t);
  for (
    const [text, code] of [["", null], ["0\n", 0], ["255\n", 255], ["7", null], ["7\nmore", 7], [
      "1234\n",
      null,
    ]] as const
  ) {
    writeFileSync(records.path("exit"), text);
    assert.equal(records.exitCode(), code, JSON.stringify(text));
  }
  // More than a string can hold.
  truncateSync(records.path("exit"), 2 ** 32);
  assert.equal(records.exitCode(), null);
});

// A disk that is full, or a loss of power.
test("Records.ended() knows nothing of an end that was not written whole", (t) => {
  const records = recordsOf(t);
  assert.equal(records.ended(), undefined);
  for (const text of ["", '{"exit_code":nu']) {
    writeFileSync(records.path("ended.json"), text);
    assert.equal(records.ended(), undefined);
  }
  records.end({ exit_code: 3, exit_message: null });
  assert.deepEqual(records.ended(), { exit_code: 3, exit_message: null });
});

test("lastLine() reads the end of a log, however much is before it", (t) => {
  const records = recordsOf(t);
  truncateSync(records.qemuLog, 2 ** 33);
  assert.equal(lastLine(records.qemuLog).replaceAll("\0", ""), "");
  appendFileSync(records.qemuLog, "\nfirst\nthe last\n");
  assert.equal(lastLine(records.qemuLog), "the last");
  assert.equal(lastLine(records.qemuLog, 2 ** 33 + 16), "it said nothing");
  assert.equal(lastLine(records.path("none")), "it said nothing");
});

// R11, F1: else the next copy would be made of the memory that this one was once made of.
test("look() of a copy whose host died at the end of its first sleep leaves its source's memory", async (t) => {
  const fleet = fleetOf(temporaryFolder(t));
  cleanup(t).defer(() => fleet[Symbol.asyncDispose]());
  for (const full of [true, false]) {
    const vm = fleet.vm(`copy-${full}`);
    const { records } = vm;
    records.make(null);
    const memory = { bytes: 1, shared: false };
    await records.begin({ args: [], memory, accel: "tcg", image: "/none", device: null });
    writeFileSync(records.base, "its source's");
    writeFileSync(records.path("state.tmp"), "");
    await records.complete({ full, plan: null });
    assert.deepEqual(await vm.look(), { state: "Standby" });
    assert.equal(existsSync(records.base), !full);
  }
});

test("Fleet.recoverLogs() finishes a rotation that was cut, of any log, where there was one", async (t) => {
  const fleet = fleetOf(temporaryFolder(t));
  cleanup(t).defer(() => fleet[Symbol.asyncDispose]());
  const { records } = fleet.vm("one");
  await fleet.recoverLogs("one"); // it has not even a folder
  records.make(null);
  await fleet.recoverLogs("one");
  writeFileSync(records.path("serial.log.next-0.new"), "half");
  writeFileSync(records.path("qemu.log.next-5"), "moved");
  await fleet.recoverLogs("one");
  const names = ["serial.log.next-0.new", "qemu.log.next-5", "qemu.log.1"];
  assert.deepEqual(names.map((name) => existsSync(records.path(name))), [false, false, true]);
});

test("Fleet.sweep() removes what is nobody's, and in ram_dir only that", {
  skip: lacking(process.platform === "linux" ? null : "it needs Linux"),
}, async (t) => {
  const ram_dir = temporaryFolder(t);
  // A host on another data_dir, and what has nothing to do with any.
  const [one, other] = [1, 2].map(() => fleetOf(temporaryFolder(t), { ...OPTIONS, ram_dir }));
  for (const fleet of [one, other]) cleanup(t).defer(() => fleet[Symbol.asyncDispose]());
  one.vm("mine").records.make(null);
  one.vm("stray").records.make(null);
  other.vm("theirs").records.make(null);
  writeFileSync(join(ram_dir, "notes"), "");
  assert.deepEqual(await one.sweep(new Set(["mine"])), ["stray"]);
  const left = ["mine", "theirs", "notes", "stray"].map((name) => existsSync(join(ram_dir, name)));
  assert.deepEqual(left, [true, true, true, false]);
});
