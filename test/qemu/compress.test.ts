import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { randomBytes } from "node:crypto";
import {
  chmodSync,
  copyFileSync,
  existsSync,
  linkSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  readlinkSync,
} from "node:fs";
import { rmSync, statSync, truncateSync, writeFileSync } from "node:fs";
import { open } from "node:fs/promises";
import { dirname, join } from "node:path";
import process from "node:process";
import { test, type TestContext } from "node:test";
import { putAway } from "../../plugins/qemu/asleep.ts";
import { Compressor, expand, keepExpanded, lacksCompression } from "../../plugins/qemu/compress.ts";
import type { Fleet } from "../../plugins/qemu/fleet.ts";
import type { Records } from "../../plugins/qemu/records.ts";
import { Unrestorable } from "../../plugins/qemu/snapshot.ts";
import type { CompressionPlan } from "../../plugins/qemu/snapshot-policy.ts";
import { processes } from "../../plugins/shared/proc.ts";
import { run } from "../../plugins/shared/run.ts";
import { capturedLogs, cleanup, lacking, temporaryFolder, until } from "../helpers.ts";
import { fleetOf } from "./fixture.ts";

const MB = 1024 * 1024;
const NEVER = new AbortController().signal;
const absent = process.platform === "linux"
  ? await lacksCompression("zstd") ?? await lacksCompression("lz4")
  : "it needs Linux";
const options = { skip: lacking(absent), timeout: 540_000 };

/** A machine that sleeps, as far as its files go. */
interface Sleeper {
  fleet: Fleet;
  instance: { id: string; name: string };
  records: Records;
  digest: string;
  bytes: number;
}

const compressing = (level: number, algorithm: "zstd" | "lz4" = "zstd", delay = 0): CompressionPlan => ({
  algorithm,
  level,
  delay,
});

/** `noise` are the bytes in the middle of its memory that do not compress. */
async function sleeper(
  t: TestContext,
  { plan = compressing(1) as CompressionPlan | null, noise = MB } = {},
): Promise<Sleeper> {
  const fleet = fleetOf(temporaryFolder(t));
  cleanup(t).defer(() => fleet[Symbol.asyncDispose]());
  const instance = { id: "sleeper", name: "web" };
  const { records } = fleet.vm(instance.id);
  const bytes = noise + 24 * MB;
  records.make(fleet.context.owner);
  records.blank(bytes, fleet.context.owner);
  await using memory = await open(records.ram, "r+");
  for (let at = 0; at < noise; at += MB) await memory.write(randomBytes(MB), 0, MB, 4 * MB + at);
  await memory.write(Buffer.alloc(4 * MB, "what a guest has in its memory "), 0, 4 * MB, 12 * MB + noise);
  await memory.sync();
  const launch = { args: [], memory: { bytes, shared: true }, accel: "tcg", image: "", device: null } as const;
  await records.begin(launch);
  await asleep(records, plan);
  return { fleet, instance, records, digest: await digestOf(records.ram), bytes };
}

async function asleep(records: Records, plan: CompressionPlan | null): Promise<void> {
  writeFileSync(records.path("state.tmp"), "the state of its devices");
  await records.complete({ full: false, plan });
}

async function digestOf(path: string): Promise<string> {
  return (await run("sha256sum", [path])).split(" ")[0];
}

const bytesOnDisk = (path: string) => statSync(path).blocks * 512;
const made = ({ ram }: Records) => readdirSync(dirname(ram)).filter((name) => /^ram./.test(name)).sort();
const isCompressing = ({ ram }: Records) => made({ ram } as Records).some((name) => name.startsWith("ram.zst."));
const isCompressed = (records: Records) => records.snapshot()?.compressed === true;

/** Empty where it is gone meanwhile. */
function listing(path: string): string[] {
  return existsSync(path) ? readdirSync(path) : [];
}

/** Processes that have to do with the files of these records. */
function busy({ folder }: Records): number[] {
  return processes().map(({ pid }) => pid).filter((pid) => pid !== process.pid && hasOpen(pid, folder));
}

function hasOpen(pid: number, folder: string): boolean {
  try {
    return readdirSync(`/proc/${pid}/fd`).some((fd) => readlinkSync(`/proc/${pid}/fd/${fd}`).startsWith(folder));
  } catch {
    return false; // it has ended, or has closed one, or is somebody else's
  }
}

for (const algorithm of ["zstd", "lz4"] as const) {
  test(`putAway() leaves of the memory of what sleeps its copy compressed by ${algorithm}`, options, async (t) => {
    const { fleet, instance, records, digest, bytes } = await sleeper(t, { plan: compressing(3, algorithm) });
    const logs = capturedLogs(t);
    const before = bytesOnDisk(records.ram);
    putAway(fleet, instance);
    await until("it is over", () => !fleet.isWatched(instance.id));
    assert.deepEqual([isCompressed(records), made(records)], [true, ["ram.zst"]]);
    assert.equal(statSync(records.ram).size, 0);
    assert.ok(bytesOnDisk(records.compressed) < before / 2);
    assert.equal(statSync(records.compressed).mode & 0o777, 0o600);
    assert.equal(logs.filter((line) => /^info: Compressed the memory of web from \d+[KM]B to /.test(line)).length, 1);

    await expand(records, { bytes, owner: fleet.context.owner, signal: NEVER });
    assert.equal(await digestOf(records.ram), digest);
    assert.ok(bytesOnDisk(records.ram) < bytes / 2, "its holes are none any more");
    const { uid, mode } = statSync(records.ram);
    assert.deepEqual([uid, mode & 0o777], [fleet.context.owner?.uid ?? process.getuid!(), 0o600]);
    assert.ok(isCompressed(records), "its snapshot is still made of the copy");

    await keepExpanded(records, { bytes, owner: fleet.context.owner, signal: NEVER });
    assert.equal(isCompressed(records), false);
    assert.deepEqual(made(records), []);
    assert.equal(await digestOf(records.ram), digest);
  });
}

test("putAway() brings memory to disk and compresses nothing where that is not planned", options, async (t) => {
  const { fleet, instance, records, digest } = await sleeper(t, { plan: null });
  assert.equal(records.snapshot()!.durable, false);
  putAway(fleet, instance);
  await until("there is nothing more to do", () => !fleet.isWatched(instance.id));
  assert.deepEqual([records.snapshot()!.durable, isCompressed(records), made(records)], [true, false, []]);
  assert.equal(await digestOf(records.ram), digest);
});

test("putAway() counts the delay from the standby on, across hosts", options, async (t) => {
  const { fleet, instance, records } = await sleeper(t, { plan: compressing(1, "zstd", 3_600_000) });
  putAway(fleet, instance);
  await until("it is durable", () => records.snapshot()!.durable);
  assert.equal(fleet.isWatched(instance.id), true);
  await fleet[Symbol.asyncDispose]();
  assert.equal(isCompressed(records), false);
  const file = records.path("snapshot.json");
  const snapshot = JSON.parse(readFileSync(file, "utf8"));
  writeFileSync(file, JSON.stringify({ ...snapshot, at: snapshot.at - 3_600_000 }));
  const next = fleetOf(fleet.context.dataDir);
  cleanup(t).defer(() => next[Symbol.asyncDispose]());
  putAway(next, instance);
  await until("it is compressed", () => isCompressed(records));
});

test("putAway() keeps a memory that does not become smaller", options, async (t) => {
  const { fleet, instance, records } = await sleeper(t);
  records.blank(2 * MB, null);
  writeFileSync(records.ram, randomBytes(2 * MB));
  putAway(fleet, instance);
  await until("there is nothing more to do", () => !fleet.isWatched(instance.id));
  assert.deepEqual([records.snapshot()!.durable, isCompressed(records), made(records)], [true, false, []]);
  assert.equal(statSync(records.ram).size, 2 * MB);
});

// R11: whatever line a host died on.
test("putAway() finds the memory whole in one file after a compression or its undoing was cut", options, async (t) => {
  const cuts: Record<string, (sleeper: Sleeper, copy: string) => void | Promise<void>> = {
    "while the copy was written": ({ records }, copy) => {
      truncateSync(copy, 1000);
      copyFileSync(copy, `${records.compressed}.0123456789ab`);
    },
    "when the copy was complete": ({ records }, copy) => copyFileSync(copy, `${records.compressed}.0123456789ab`),
    "when the copy had its name": ({ records }, copy) => copyFileSync(copy, records.compressed),
    "when the copy counted": async ({ records }, copy) => {
      copyFileSync(copy, records.compressed);
      await records.amend({ compressed: true });
    },
    "when the memory was removed": async ({ records }, copy) => {
      copyFileSync(copy, records.compressed);
      await records.amend({ compressed: true });
      rmSync(records.ram);
    },
    "while the memory was written out": async ({ records }, copy) => {
      copyFileSync(copy, records.compressed);
      await records.amend({ compressed: true });
      records.blank(0, null);
      writeFileSync(`${records.ram}.raw.0123456789ab`, "the begin of it");
    },
    "when the memory was written out, not on disk": async ({ records }, copy) => {
      copyFileSync(copy, records.compressed);
      await records.amend({ compressed: true });
      writeFileSync(records.ram, "what a machine that lost its power has left of it");
    },
    "when the memory counted again": ({ records }, copy) => copyFileSync(copy, records.compressed),
    "with a copy of a sleep before": ({ records }) => writeFileSync(records.compressed, "of another time"),
  };
  for (const [cut, leave] of Object.entries(cuts)) {
    const about = await sleeper(t, { plan: null });
    const { fleet, instance, records, digest, bytes } = about;
    await records.amend({ durable: true });
    const compressor = new Compressor();
    const kept = join(temporaryFolder(t), "copy");
    const copy = await compressor.copy(instance.id, records, { algorithm: "zstd", level: 1 }, NEVER);
    copyFileSync(copy, kept);
    rmSync(copy);
    await leave(about, kept);
    putAway(fleet, instance);
    await until("there is nothing more to do", () => !fleet.isWatched(instance.id));
    const compressed = isCompressed(records);
    assert.deepEqual(made(records), compressed ? ["ram.zst"] : [], cut);
    assert.equal(statSync(records.ram, { throwIfNoEntry: false })?.size ?? 0, compressed ? 0 : bytes, cut);
    if (compressed) await expand(records, { bytes, owner: null, signal: NEVER });
    assert.equal(await digestOf(records.ram), digest, cut);
  }
});

// R12
test("quiet() ends a compression in the middle and leaves the memory alone", options, async (t) => {
  const { fleet, instance, records, digest } = await sleeper(t, { plan: compressing(19), noise: 96 * MB });
  putAway(fleet, instance);
  await until("it is under way", () => isCompressing(records) && busy(records).length > 0);
  // As a restore does: in a turn of its own, which the compression does not hold.
  await fleet.turn(instance.id, async () => {
    await fleet.quiet(instance.id);
    assert.deepEqual(busy(records), []);
  });
  await until("its copy is gone", () => made(records).length === 0);
  assert.equal(isCompressed(records), false);
  assert.equal(await digestOf(records.ram), digest);

  putAway(fleet, instance);
  await until("it is under way again", () => isCompressing(records));
  await fleet[Symbol.asyncDispose]();
  assert.deepEqual([busy(records), made(records), isCompressed(records)], [[], [], false]);

  putAway(fleet, instance);
  await until("it is under way once more", () => isCompressing(records));
  await fleet.erase(instance.id);
  assert.deepEqual([busy(records), listing(records.folder)], [[], []]);
});

// R12
test("putAway() does not compress what forks read, or what is another sleep's", options, async (t) => {
  const changes: Record<string, (records: Records) => void | Promise<void>> = {
    "there is a fork": ({ ram }) => linkSync(ram, join(dirname(ram), "fork")),
    "it slept anew": async (records) => {
      await records.spend();
      await asleep(records, null);
    },
    "it runs": (records) => records.spend(),
  };
  for (const [change, make] of Object.entries(changes)) {
    const { fleet, instance, records, digest } = await sleeper(t, { plan: compressing(9), noise: 16 * MB });
    putAway(fleet, instance);
    await until("it is under way", () => busy(records).length > 0);
    await make(records);
    await until("it is over", () => !fleet.isWatched(instance.id));
    assert.deepEqual([isCompressed(records), made(records)], [false, []], change);
    assert.equal(await digestOf(records.ram), digest, change);
  }
  const { fleet, instance, records } = await sleeper(t);
  linkSync(records.ram, join(records.folder, "fork"));
  putAway(fleet, instance);
  await until("it is durable", () => records.snapshot()!.durable);
  for (let turns = 0; turns < 3; turns++) await fleet.turn(instance.id, async () => {});
  assert.deepEqual([busy(records), made(records)], [[], []]);
  rmSync(join(records.folder, "fork"));
  putAway(fleet, instance);
  await until("it is compressed", () => isCompressed(records));
});

test("expand() says what is wrong with a copy that is broken, and changes nothing", options, async (t) => {
  const { fleet, instance, records, bytes } = await sleeper(t);
  putAway(fleet, instance);
  await until("it is over", () => !fleet.isWatched(instance.id));
  const whole = readFileSync(records.compressed);
  const flipped = Buffer.from(whole);
  flipped[whole.length >> 1] ^= 0xff;
  const broken: [Uint8Array | undefined, RegExp][] = [
    [whole.subarray(0, whole.length - 100), /premature end/],
    [flipped, /corrupt|checksum|Decoding error/i],
    [Buffer.from("no such thing"), /unsupported format/],
    [Buffer.alloc(0), /unexpected end/],
    [undefined, /No such file/],
  ];
  for (const [content, reason] of broken) {
    rmSync(records.compressed, { force: true });
    if (content) writeFileSync(records.compressed, content);
    const options = { bytes, owner: null, signal: NEVER };
    await assert.rejects(expand(records, options), (error: Error) => {
      assert.ok(error instanceof Unrestorable, "it can never wake");
      assert.match(error.message, /^its memory cannot be decompressed: /);
      assert.match(error.message, reason);
      return true;
    });
    assert.deepEqual([isCompressed(records), statSync(records.ram).size], [true, 0]);
    assert.deepEqual(made(records), content ? ["ram.zst"] : []);
  }
  writeFileSync(records.compressed, whole);
  await assert.rejects(expand(records, { bytes: bytes + 1, owner: null, signal: NEVER }), /in the place of/);
  const reason = new Error("overtaken");
  const aborted = expand(records, { bytes, owner: null, signal: AbortSignal.abort(reason) });
  await assert.rejects(aborted, (error) => error === reason);
  assert.deepEqual(made(records), ["ram.zst"]);
});

test("expand() ends in the middle and leaves the copy alone when it is aborted", options, async (t) => {
  const { fleet, instance, records, bytes } = await sleeper(t);
  putAway(fleet, instance);
  await until("it is over", () => !fleet.isWatched(instance.id));
  const whole = readFileSync(records.compressed);
  // Of which one half comes, and the other does not.
  rmSync(records.compressed);
  await run("mkfifo", [records.compressed]);
  const controller = new AbortController();
  const reason = new Error("overtaken");
  const expanding = expand(records, { bytes, owner: null, signal: controller.signal });
  const aborted = assert.rejects(expanding, (error) => error === reason);
  const pipe = await open(records.compressed, "w");
  await pipe.write(whole.subarray(0, whole.length / 2));
  await until("some is written", () => made(records).some((name) => statSync(join(records.folder, name)).blocks > 0));
  controller.abort(reason);
  await aborted;
  await pipe.close();
  // What another test begins at this moment has all that is open here, until it is a program of its own.
  await until("nobody has any of it open", () => busy(records).length === 0);
  assert.deepEqual([made(records), statSync(records.ram).size], [["ram.zst"], 0]);
});

test("lacksCompression() says what is missing", options, async (t) => {
  const folder = temporaryFolder(t);
  const without = async (name: string, stand?: string) => {
    rmSync(folder, { recursive: true });
    mkdirSync(folder);
    for (const program of ["setpriv", "nice", "ionice", "zstd"]) {
      const script = program === name ? stand : `exec ${await run("which", [program])} "$@"`;
      if (script === undefined) continue;
      writeFileSync(join(folder, program), `#!/bin/sh\n${script}\n`);
      chmodSync(join(folder, program), 0o755);
    }
    return await lacksCompression("lz4", { PATH: folder });
  };
  assert.equal(await without(""), null);
  assert.match((await without("zstd"))!, /zstd/);
  assert.match((await without("setpriv"))!, /setpriv/);
  assert.match((await without("zstd", "echo Incorrect parameters >&2; exit 1"))!, /Incorrect parameters/);
});
