import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { test } from "node:test";
import { execa } from "execa";
import { cpio, type CpioEntry } from "../../plugins/qemu/cpio.ts";
import { missingProgram } from "../../plugins/shared/programs.ts";
import { lacking } from "../helpers.ts";

const skip = lacking(missingProgram(["cpio"]) === undefined ? null : "there is no cpio");
const ENTRIES: CpioEntry[] = [
  { path: "a", kind: "folder", mode: 0o750 },
  { path: "a/file", kind: "file", mode: 0o644, content: Buffer.from("12345") },
  { path: "a/empty", kind: "file", mode: 0o600, content: Buffer.of() },
  { path: "link", kind: "link", target: "a/file" },
  { path: "console", kind: "character", mode: 0o600, major: 5, minor: 1 },
];

test("cpio() makes the same bytes of the same entries, each part at a multiple of four", () => {
  const archive = cpio(ENTRIES);
  assert.deepEqual(cpio(ENTRIES), archive);
  assert.equal(archive.length % 4, 0);
  assert.equal(archive.toString("latin1", 0, 6), "070701");
});

// The kernel that boots from one is the other witness: demo.test.ts.
test("cpio() is read by cpio", { skip }, async () => {
  const { stdout } = await execa("cpio", ["--list", "--verbose", "--numeric-uid-gid"], {
    input: cpio(ENTRIES),
    env: { TZ: "UTC" },
  });
  const lines = stdout.split("\n").map((line) => line.replace(/\s+/g, " "));
  assert.deepEqual(lines, [
    "drwxr-x--- 1 0 0 0 Jan 1 1970 a",
    "-rw-r--r-- 1 0 0 5 Jan 1 1970 a/file",
    "-rw------- 1 0 0 0 Jan 1 1970 a/empty",
    "lrwxrwxrwx 1 0 0 6 Jan 1 1970 link -> a/file",
    "crw------- 1 0 0 5, 1 Jan 1 1970 console",
  ]);
});
