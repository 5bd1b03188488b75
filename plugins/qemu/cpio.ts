import { Buffer } from "node:buffer";

/** A file of an archive. `path` has no leading slash; every folder on the way must come before it. */
export type CpioEntry =
  | { path: string; kind: "folder"; mode: number }
  | { path: string; kind: "file"; mode: number; content: Uint8Array }
  | { path: string; kind: "link"; target: string }
  | { path: string; kind: "character"; mode: number; major: number; minor: number };

// Types of files in the upper bits of a mode, inode(7).
const TYPES = { folder: 0o040000, file: 0o100000, link: 0o120000, character: 0o020000 } as const;

/**
 * An archive in the format that Linux unpacks as an initramfs, "newc" of
 * https://docs.kernel.org/driver-api/early-userspace/buffer-format.html. Everything belongs to root and is of the year
 * 1970, whoever makes it and when: the same entries are the same bytes. The program `cpio` needs root for that.
 */
export function cpio(entries: readonly CpioEntry[]): Buffer {
  const parts: Buffer[] = [];
  entries.forEach((entry, index) => parts.push(...record(entry, index + 1)));
  return Buffer.concat([...parts, ...record({ path: "TRAILER!!!", kind: "file", mode: 0, content: Buffer.of() }, 0)]);
}

function record(entry: CpioEntry, inode: number): Buffer[] {
  const { path, kind } = entry;
  const content = kind === "file" ? entry.content : Buffer.from(kind === "link" ? entry.target : "");
  const mode = inode === 0 ? 0 : TYPES[kind] | (kind === "link" ? 0o777 : entry.mode);
  const [major, minor] = kind === "character" ? [entry.major, entry.minor] : [0, 0];
  const name = Buffer.from(`${path}\0`);
  // inode, mode, uid, gid, links, mtime, size, device of the file, device that it is, length of the name, checksum.
  const fields = [inode, mode, 0, 0, 1, 0, content.length, 0, 0, major, minor, name.length, 0];
  const header = `070701${fields.map((field) => field.toString(16).padStart(8, "0")).join("")}`;
  return [padded(Buffer.concat([Buffer.from(header), name])), padded(content)];
}

function padded(bytes: Uint8Array): Buffer {
  return Buffer.concat([bytes, Buffer.alloc(-bytes.length & 3)]);
}
