import assert from "node:assert/strict";
import { chmodSync, existsSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { test, type TestContext } from "node:test";
import { getLogger } from "@logtape/logtape";
import { Accelerator, type AcceleratorOptions } from "../../plugins/qemu/accel.ts";
import type { Owner } from "../../plugins/qemu/records.ts";
import { processStat } from "../../plugins/shared/proc.ts";
import { run } from "../../plugins/shared/run.ts";
import { capturedLogs, lacking, temporaryFolder, until } from "../helpers.ts";
import { demoImage, skipGuest } from "./guest.ts";

const log = getLogger(["dormouse", "qemu"]);
const NOBODY = { uid: 65_534, gid: 65_534 };

/** A program in the place of QEMU, and a device that anybody may open. */
class Stage {
  readonly folder: string;
  readonly file: string;
  readonly logs: string[];
  readonly image: { kernel: string };
  readonly options: AcceleratorOptions;

  constructor(t: TestContext) {
    this.folder = temporaryFolder(t);
    chmodSync(this.folder, 0o777);
    this.file = join(this.folder, "answers", "accel.json");
    this.image = { kernel: join(this.folder, "kernel") };
    this.options = { device: this.image.kernel, timeout: 20_000, qemu: join(this.folder, "qemu-system-x86_64") };
    writeFileSync(this.image.kernel, "");
    writeFileSync(this.#pids, "");
    chmodSync(this.#pids, 0o666);
    this.logs = capturedLogs(t);
  }

  /** `script` is what it does when it is to boot a guest; each time it is asked to is a line of `pids`. */
  qemu(script: string, version = "7.2"): void {
    const text = `#!/bin/sh
[ "$1" = --version ] && echo "QEMU ${version}" && exit
echo $$ >>${this.#pids}
${script}
`;
    writeFileSync(join(this.folder, "qemu-system-x86_64"), text, { mode: 0o755 });
  }

  get #pids(): string {
    return join(this.folder, "pids");
  }

  /** Of those that were to boot a guest. */
  pids(): number[] {
    return readFileSync(this.#pids, "latin1").split("\n").filter(Boolean).map(Number);
  }

  /** Those of them that are still there; that nobody has asked for their exit code yet is not their fault. */
  left(): number[] {
    return this.pids().filter((pid) => !["Z", "X", undefined].includes(processStat(pid)?.state));
  }

  /** What a host that is started now finds. */
  find(options: AcceleratorOptions = {}): Promise<string> {
    return new Accelerator("auto", this.file, log, { ...this.options, ...options }).of(this.image);
  }
}

test("Accelerator.of() answers what it was told without a look at the machine", async (t) => {
  const stage = new Stage(t);
  stage.qemu("exit 0");
  for (const wanted of ["kvm", "tcg"] as const) {
    assert.equal(await new Accelerator(wanted, stage.file, log).of(stage.image), wanted);
  }
  assert.deepEqual([stage.pids(), existsSync(stage.file)], [[], false]);
});

test("Accelerator.of() boots a guest under KVM, and emulates where that does not end as it should", {
  skip: skipGuest,
  timeout: 540_000,
}, async (t) => {
  const qemu = await run("sh", ["-c", "command -v qemu-system-x86_64"]);
  const stage = new Stage(t);
  const image = { kernel: join(await demoImage(), "vmlinuz") };
  const machines: [string, string, Owner | null][] = [["as machines are", "", null], [
    "another CPU",
    "-cpu qemu64",
    null,
  ]];
  if (process.getuid?.() === 0) machines.push(["as nobody", "", NOBODY]);
  for (const [what, args, owner] of machines) {
    stage.qemu(`exec ${qemu} "$@" ${args}`, what);
    const found = await new Accelerator("auto", stage.file, log, { qemu: stage.options.qemu!, owner, timeout: 3_000 })
      .of(image);
    const told = stage.logs.splice(0);
    t.diagnostic(`seen: ${what}: ${found} ${told}`);
    assert.equal(told.length, found === "tcg" ? 1 : 0);
    if (found === "tcg") assert.match(told[0], /^warning: Machines are emulated, which is slow: .*KVM/);
    await until("the guest is gone", () => stage.left().length === 0);
  }
});

test("Accelerator.of() ends a guest that hangs, and does not try again where nothing has changed", async (t) => {
  const stage = new Stage(t);
  stage.qemu("trap '' TERM; exec sleep 600");
  const accelerator = new Accelerator("auto", stage.file, log, { ...stage.options, timeout: 3_000 });
  assert.deepEqual(await Promise.all([1, 2, 3].map(() => accelerator.of(stage.image))), ["tcg", "tcg", "tcg"]);
  assert.equal(stage.pids().length, 1);
  await until("the guest that hangs is gone", () => stage.left().length === 0);
  assert.match(stage.logs[0], /a guest under KVM was still running after 3000 ms \(remembered in .*accel\.json\)$/);

  assert.equal(await stage.find(), "tcg");
  assert.deepEqual([stage.pids().length, stage.logs[1]], [1, stage.logs[0]]);
  // Some day it is tried again, for it may have been that image alone.
  const kept = JSON.parse(readFileSync(stage.file, "utf8"));
  writeFileSync(stage.file, JSON.stringify({ ...kept, at: kept.at - 86_400_000 }));
  assert.equal(await stage.find({ timeout: 3_000 }), "tcg");
  assert.equal(stage.pids().length, 2);
  stage.qemu("exit 0", "8.0");
  assert.equal(await stage.find(), "kvm");
  assert.equal(stage.pids().length, 3);
});

test("Accelerator.of() remembers that KVM works for as long as its device is there", async (t) => {
  const stage = new Stage(t);
  stage.qemu("exit 0");
  assert.equal(await stage.find(), "kvm");
  assert.equal(await stage.find(), "kvm");
  assert.equal(stage.pids().length, 1);
  assert.equal(await stage.find({ device: join(stage.folder, "none") }), "tcg");
  assert.match(stage.logs[0], /: no KVM: ENOENT/);
  assert.equal(await stage.find(), "kvm");
  assert.deepEqual([stage.pids().length, stage.logs.length], [1, 1]);
});

test("Accelerator.of() tries anew what was quick to fail, and where its file says nothing", async (t) => {
  const stage = new Stage(t);
  stage.qemu("echo Permission denied >&2; exit 1");
  assert.equal(await stage.find(), "tcg");
  assert.match(stage.logs[0], /: a guest does not run under KVM: Permission denied$/);
  assert.ok(!existsSync(stage.file));
  stage.qemu("exit 0");
  for (const text of [undefined, "", "null", "{", '{"accel":"tcg"}', '{"accel":"hvf","where":"","reason":null}']) {
    if (text !== undefined) writeFileSync(stage.file, text);
    const before = stage.pids().length;
    assert.equal(await stage.find(), "kvm", text);
    assert.equal(stage.pids().length, before + 1, text);
  }
});

test("Accelerator.of() answers also where the answer cannot be kept", async (t) => {
  const stage = new Stage(t);
  stage.qemu("exit 0");
  writeFileSync(join(stage.folder, "answers"), "a file in the place of the folder");
  assert.equal(await stage.find(), "kvm");
  assert.match(stage.logs[0], /^warning: Cannot write .*accel\.json/);
});

test("Accelerator.of() boots the guest as who runs the machines", {
  skip: lacking(process.getuid?.() === 0 ? null : "it needs root"),
}, async (t) => {
  const stage = new Stage(t);
  stage.qemu('[ "$(id -u)" = 65534 ]');
  assert.equal(await stage.find({ owner: NOBODY }), "kvm");
  assert.equal(await stage.find(), "tcg", "an answer is one user's");
});
