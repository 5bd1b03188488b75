import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import {
  chmodSync,
  chownSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { test, type TestContext } from "node:test";
import { getLogger } from "@logtape/logtape";
import { execaSync } from "execa";
import { DormouseError, type ErrorCode, type Host } from "../../main.ts";
import { Images } from "../../plugins/qemu/images.ts";
import qemu from "../../plugins/qemu/mod.ts";
import { lacking, temporaryFolder } from "../helpers.ts";

const IS_ROOT = process.getuid?.() === 0;

/** The begin of a Linux kernel, as far as anybody looks. */
const KERNEL = Buffer.concat([Buffer.alloc(0x202), Buffer.from("HdrS"), Buffer.alloc(100)]);

function folderWith(t: TestContext, toml: string, files: Record<string, string | Uint8Array> = {}): string {
  const folder = temporaryFolder(t);
  for (const [name, content] of Object.entries({ "image.toml": toml, ...files })) {
    writeFileSync(join(folder, name), content);
  }
  return folder;
}

function refused(code: ErrorCode, reason: RegExp) {
  return (error: unknown) => {
    assert.ok(error instanceof DormouseError, String(error));
    assert.equal(error.code, code, error.message);
    assert.match(error.message, reason);
    return true;
  };
}

test("Images.read() gives absolute paths and what the description leaves out", (t) => {
  const toml = 'kernel = "vmlinuz"\nsize = "64MB"\n[disk]\nfile = "disk.raw"\nformat = "raw"';
  const folder = folderWith(t, toml, { vmlinuz: KERNEL, "disk.raw": "x" });
  const image = new Images(temporaryFolder(t)).read(folder);
  assert.equal(image.kernel, join(folder, "vmlinuz"));
  assert.deepEqual(image.disk, { file: join(folder, "disk.raw"), format: "raw" });
  assert.deepEqual([image.initrd, image.vcpus, image.size, image.agent], [null, 1, 64 * 1024 * 1024, false]);
});

test("Images.read() says what is wrong with an image before anything is made of it", (t) => {
  const images = new Images(temporaryFolder(t));
  const cases: [string, Record<string, string | Uint8Array>, RegExp][] = [
    ["kernel =", {}, /TOML|value/i],
    ["", {}, /image\.toml: kernel/],
    ['kernel = "k"\nkernl = 1', { k: KERNEL }, /image\.toml: kernl/],
    ['kernel = "k"', {}, /k is missing$/],
    ['kernel = "k"', { k: "" }, /k is empty$/],
    ['kernel = "k"', { k: "MZ, but no kernel" }, /k is not a Linux kernel/],
    ['kernel = "../k"', {}, /inside the image's folder/],
    ['kernel = "/boot/vmlinuz"', {}, /inside the image's folder/],
    ['kernel = "k"\ninitrd = "i"', { k: KERNEL, i: "text" }, /i is not an initramfs/],
    ['kernel = "k"\ndisk = { file = "d", format = "qcow2" }', { k: KERNEL, d: "raw" }, /d is not a qcow2 disk/],
    ['kernel = "k"\ndisk = { file = "d", format = "vmdk" }', { k: KERNEL }, /disk\.format/],
    ['kernel = "k"\narch = "aarch64"', { k: KERNEL }, /arch/],
    ['kernel = "k"\ncmdline = "a\\u0000b"', { k: KERNEL }, /cmdline: expected printable/],
    [`kernel = "k"\ncmdline = "${"x".repeat(2_000)}"`, { k: KERNEL }, /cmdline/],
  ];
  for (const [toml, files, reason] of cases) {
    assert.throws(() => images.read(folderWith(t, toml, files)), refused("invalid_image", reason), toml);
  }
  for (const name of ["../up", "a/b", "", ".hidden", "UPPER", "a".repeat(101)]) {
    assert.throws(() => images.read(name), refused("invalid_image", /expected a name or an absolute path/), name);
  }
  assert.throws(() => images.read("nothing"), refused("image_not_found", /No image "nothing"/));
  assert.throws(() => images.read("demo"), refused("image_not_found", /"deno task image:demo" builds it$/));
  assert.throws(() => images.read("/no/such/folder"), refused("image_not_found", /No image/));
});

// Who may name a folder may still not read what only this host can.
test("Images.read() stays in the folder, and waits for nobody in it", (t) => {
  const images = new Images(temporaryFolder(t), { uid: 65_534, gid: 65_534 });
  const [outside, inside] = [folderWith(t, 'kernel = "k"', { k: KERNEL }), () => folderWith(t, 'kernel = "k"')];
  const linked = (name: string, to: string, folder = inside()) => {
    rmSync(join(folder, name), { force: true });
    symlinkSync(to, join(folder, name));
    return folder;
  };
  const piped = (name: string, folder = inside()) => {
    rmSync(join(folder, name), { force: true });
    execaSync("mkfifo", [join(folder, name)]);
    return folder;
  };
  const cases: [string, RegExp][] = [
    [linked("k", join(outside, "k")), /k is a link to what user 65534, as whom QEMU runs, cannot reach$/],
    [
      linked("image.toml", join(outside, "image.toml")),
      /image\.toml is a link to what user 65534, [^,]*, cannot reach$/,
    ],
    [linked("k", "/etc/shadow"), /k is a link to what user 65534, [^,]*, cannot reach$/],
    [linked("k", "/etc/passwd"), /k is not a Linux kernel/],
    [linked("k", "/dev/zero"), /k is no file$/],
    [piped("k"), /k is no file$/],
    [piped("image.toml"), /image\.toml is no file$/],
    [folderWith(t, "#".repeat(100_000)), /image\.toml is of more than 65536 bytes$/],
    [folderWith(t, "root:secret:1"), /^Cannot use image "[^"]+": image\.toml: [^\n]*$/],
  ];
  for (const [folder, reason] of cases) {
    assert.throws(() => images.read(folder), (error: Error) => {
      assert.doesNotMatch(error.message, /secret/);
      return refused("invalid_image", reason)(error);
    });
  }
  assert.throws(() => images.readNamed(outside), refused("image_not_found", /expected a name/));
});

test("Images.read() refuses a disk that is made of other files, and a file that QEMU's user cannot read", (t) => {
  const header = (change: (bytes: Buffer) => void) => {
    const bytes = Buffer.alloc(104);
    bytes.write("QFI\xfb", 0, "latin1");
    bytes.writeUInt32BE(3, 4);
    change(bytes);
    return bytes;
  };
  const toml = 'kernel = "k"\ndisk = { file = "d", format = "qcow2" }';
  const images = new Images(temporaryFolder(t), { uid: 65_534, gid: 65_534 });
  const reading = (d: Buffer) => images.read(folderWith(t, toml, { k: KERNEL, d }));
  assert.equal(reading(header(() => {})).disk?.format, "qcow2");
  const backed = header((bytes) => bytes.writeBigUInt64BE(512n, 8));
  assert.throws(() => reading(backed), refused("invalid_image", /d is built on another file$/));
  const split = header((bytes) => bytes.writeBigUInt64BE(4n, 72));
  assert.throws(() => reading(split), refused("invalid_image", /d has its data in another file$/));

  const folder = folderWith(t, 'kernel = "k"', { k: KERNEL });
  chmodSync(join(folder, "k"), 0o600);
  assert.throws(() => images.read(folder), refused("invalid_image", /k cannot be read by user 65534/));
  assert.equal(new Images(folder).read(folder).kernel, join(folder, "k"), "for its own user");
});

test(
  "Images.add() makes what QEMU's user can read of what it alone can read, and nobody can write",
  { skip: lacking(IS_ROOT ? null : "it needs root") },
  async (t) => {
    const images = new Images(join(temporaryFolder(t), "images"), { uid: 65_534, gid: 65_534 });
    for (const [mode, uid, gid] of [[0o400, 65_534, 0], [0o440, 0, 65_534]]) {
      const folder = folderWith(t, 'kernel = "k"', { k: KERNEL });
      chmodSync(join(folder, "k"), mode);
      chownSync(join(folder, "k"), uid, gid);
      const copy = await images.add(`image-${mode}`, folder);
      const { mode: kept, uid: user, gid: group } = statSync(copy.kernel);
      assert.deepEqual([kept & 0o777, user, group], [0o640, 0, 65_534]);
    }
  },
);

test("Images.add() copies what can be used, under a name that is free, and remove() takes it away", async (t) => {
  const folder = join(temporaryFolder(t), "images");
  const images = new Images(folder);
  const source = folderWith(t, 'kernel = "k"', { k: KERNEL });
  assert.deepEqual(images.names(), []);
  assert.equal((await images.add("one", source)).folder, join(folder, "one"));
  assert.deepEqual(images.names(), ["one"]);
  await assert.rejects(images.add("one", source), refused("name_conflict", /there already/));
  await assert.rejects(images.add("../two", source), refused("invalid_image", /name/));
  await assert.rejects(images.add("two", "relative"), refused("invalid_image", /absolute/));
  await assert.rejects(images.add("two", folderWith(t, "")), refused("invalid_image", /kernel/));
  assert.throws(() => images.read("onee"), refused("image_not_found", /"one"/));
  const [first, second] = await Promise.allSettled([images.add("two", source), images.add("two", source)]);
  const loser = first.status === "rejected" ? first : second as PromiseRejectedResult;
  assert.deepEqual([first.status, second.status].toSorted(), ["fulfilled", "rejected"]);
  assert.ok(refused("name_conflict", /there already/)(loser.reason));
  await images.remove("two");
  await images.remove("one");
  await assert.rejects(images.remove("one"), refused("image_not_found", /No image/));
  mkdirSync(folder, { recursive: true });
  assert.deepEqual(readdirSync(folder), []);
});

test("Images.add() makes a copy that does without what it was made of, links in it included", async (t) => {
  const images = new Images(join(temporaryFolder(t), "images"));
  const source = folderWith(t, 'kernel = "k"', { "k-6.1": KERNEL });
  symlinkSync("k-6.1", join(source, "k"));
  // Nothing but what the image is made of: it would have no end.
  symlinkSync(".", join(source, "loop"));
  await images.add("one", source);
  assert.deepEqual(readdirSync(images.pathOf("one")).toSorted(), ["image.toml", "k"]);
  rmSync(source, { recursive: true });
  assert.deepEqual(readFileSync(images.read("one").kernel), KERNEL);
});

test("Images.sweep() removes what a copy or a removal that was cut has left, and nothing else", async (t) => {
  const folder = temporaryFolder(t);
  const images = new Images(folder);
  for (
    const name of [".one.copy-aB3xYz", ".two.gone-000000", ".packages", ".demo-building-aB3xYz", "one.copy-aB3xYz"]
  ) {
    mkdirSync(join(folder, name, "image"), { recursive: true });
  }
  await images.sweep();
  assert.deepEqual(readdirSync(folder).toSorted(), [".demo-building-aB3xYz", ".packages", "one.copy-aB3xYz"]);
  await new Images(join(folder, "none")).sweep();
});

test("Images.isSame() knows a folder by every way that leads to it", (t) => {
  const folder = temporaryFolder(t);
  const images = new Images(join(folder, "images"));
  for (const name of ["one", "two"]) mkdirSync(join(folder, "images", name), { recursive: true });
  symlinkSync("images", join(folder, "link"));
  for (const path of ["images/one", "images/one/", "images/../images//one", "link/one"]) {
    assert.ok(images.isSame(`${folder}/${path}`, "one"), path);
    assert.ok(!images.isSame(`${folder}/${path}`, "two"), path);
  }
  assert.ok(!images.isSame("gone", "one"));
  assert.ok(images.isSame("gone", "gone"));
});

test("the command image-demo makes a data_dir that is its owner's alone", async (t) => {
  const dataDir = join(temporaryFolder(t), "data");
  const host = { dataDir, log: getLogger("dormouse-test"), signal: AbortSignal.abort(new Error("enough")) } as Host;
  await assert.rejects(async () => qemu.commands!["image-demo"].run(host, {} as never));
  assert.equal(statSync(dataDir).mode & 0o777, 0o700);
  assert.deepEqual(new Images(join(dataDir, "images")).names(), []);
});
