/** A machine that does nothing, for tests of what goes on around one: it is there at once, and never ready. */
import { Buffer } from "node:buffer";
import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import type { TestContext } from "node:test";
import { stringify } from "smol-toml";
import { temporaryFolder } from "../helpers.ts";

/** The folder of an image whose kernel halts where others begin. */
export function idleImage(t: TestContext, change: Record<string, unknown> = {}): string {
  const folder = join(temporaryFolder(t), "idle");
  mkdirSync(folder);
  writeFileSync(join(folder, "vmlinuz"), kernel());
  writeFileSync(join(folder, "image.toml"), stringify({ kernel: "vmlinuz", size: "64MB", agent: true, ...change }));
  return folder;
}

/** As a loader wants it, by the kernel's x86 boot protocol: the code begins at 0x200, by jumping over the header. */
function kernel(): Buffer {
  const image = Buffer.alloc(4096);
  image[0x1f1] = 1; // sectors of code after the first
  image.writeUInt16LE(0xaa55, 0x1fe);
  image.writeUInt16LE(0x66eb, 0x200); // jmp 0x268
  image.write("HdrS", 0x202, "latin1");
  image.writeUInt16LE(0x0204, 0x206);
  image[0x211] = 1; // the rest goes to 1 MiB
  image.writeUInt32LE(0xfdebf4fa, 0x268); // cli; again: hlt; jmp again
  return image;
}
