import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { readFileSync, realpathSync } from "node:fs";
import process from "node:process";
import { test } from "node:test";
import { elfNeeds } from "../../plugins/qemu/elf.ts";
import { run } from "../../plugins/shared/run.ts";
import { lacking } from "../helpers.ts";

const skip = lacking(
  process.platform === "linux" && process.arch === "x64" ? null : "there are no programs to look at",
);

test("elfNeeds() names what the dynamic linker would load", { skip }, async () => {
  const shell = realpathSync("/bin/sh");
  const { interpreter, libraries } = elfNeeds(readFileSync(shell));
  assert.equal(interpreter, "/lib64/ld-linux-x86-64.so.2");
  const told = await run("ldd", [shell]);
  for (const library of libraries) assert.ok(told.includes(library), library);
  assert.ok(libraries.includes("libc.so.6"), String(libraries));
});

test("elfNeeds() refuses what is no ELF file, and what is cut off", { skip }, () => {
  const whole = readFileSync(realpathSync("/bin/sh"));
  const cases: [string, Uint8Array][] = [
    ["nothing", Buffer.of()],
    ["a script", Buffer.from("#!/bin/sh\n")],
    ["32 bits", Buffer.concat([Buffer.from("\x7fELF\x01\x01"), Buffer.alloc(100)])],
    ["only its beginning", whole.subarray(0, 60)],
  ];
  for (const [what, bytes] of cases) assert.throws(() => elfNeeds(bytes), RangeError, what);
});
