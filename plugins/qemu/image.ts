/** One image: a folder with an `image.toml`. Who names a folder need not be trusted with what this host can read. */
import { Buffer } from "node:buffer";
import {
  closeSync,
  constants,
  fstatSync,
  openSync,
  readFileSync,
  readlinkSync,
  readSync,
  realpathSync,
  type Stats,
  statSync,
} from "node:fs";
import { dirname, isAbsolute, join, normalize, sep } from "node:path";
import { parse as parseToml } from "smol-toml";
import * as v from "valibot";
import { messageOf } from "../shared/errors.ts";
import { size } from "../shared/schemas.ts";
import type { Owner } from "./records.ts";

export const FILE = "image.toml";
/** Bytes of a description. */
const MAX_DESCRIPTION = 64 * 1024;
/** What a user may do with a file, and with a folder: the bits of a mode. */
const [READ, SEARCH] = [0o4, 0o1];
/** Bytes of a file by which its kind is known. */
const HEAD = 0x210;

const Inside = v.pipe(
  v.string(),
  v.nonEmpty(),
  v.check(
    (path) => !isAbsolute(path) && !normalize(path).startsWith(".."),
    "expected a path inside the image's folder",
  ),
);
const Description = v.strictObject({
  kernel: Inside,
  initrd: v.optional(Inside),
  disk: v.optional(v.strictObject({ file: Inside, format: v.picklist(["raw", "qcow2"]) })),
  /** Added to what Dormouse itself says to the kernel. */
  cmdline: v.optional(
    v.pipe(v.string(), v.maxLength(1500), v.regex(/^[ -~]*$/, "expected printable characters of ASCII")),
    "",
  ),
  arch: v.optional(v.literal("x86_64"), "x86_64"),
  vcpus: v.optional(v.pipe(v.number(), v.integer(), v.minValue(1), v.maxValue(255)), 1),
  size: v.optional(size({ min: 16 * 1024 * 1024 }), "256MB"),
  /** Whether it runs qemu-guest-agent. */
  agent: v.optional(v.boolean(), false),
  /** It is ready once this TCP port answers; where neither this nor an agent is there, as soon as it runs. */
  ready_port: v.optional(v.pipe(v.number(), v.integer(), v.minValue(1), v.maxValue(65535))),
  /** Whether it asks for its address by DHCP, in the place of reading it from the kernel's command line. */
  dhcp: v.optional(v.boolean(), false),
});

/** An image that was read and checked; paths are absolute, sizes bytes. */
export interface Image extends Omit<v.InferOutput<typeof Description>, "kernel" | "initrd" | "disk"> {
  readonly name: string;
  readonly folder: string;
  readonly kernel: string;
  readonly initrd: string | null;
  readonly disk: { readonly file: string; readonly format: "raw" | "qcow2" } | null;
}

/** What a file is to be, and how its begin shows that; `refuse` says what is wrong with one of them. */
interface Kind {
  readonly what: string;
  readonly magics: readonly (readonly [offset: number, magic: string])[];
  readonly refuse?: (head: Buffer) => string | undefined;
}
const KINDS = {
  kernel: { what: "a Linux kernel (bzImage or ELF)", magics: [[0x202, "HdrS"], [0, "\x7fELF"]] },
  initrd: {
    what: "an initramfs (cpio, gzip, zstd, xz, lz4 or bzip2)",
    magics: ["0707", "\x1f\x8b", "\x28\xb5\x2f\xfd", "\xfd7zXZ", "\x02\x21\x4c\x18", "BZh"].map((magic) =>
      [0, magic] as const
    ),
  },
  raw: { what: "a disk", magics: [[0, ""]] },
  qcow2: { what: "a qcow2 disk", magics: [[0, "QFI\xfb"]], refuse: needsAnother },
} satisfies Record<string, Kind>;

/**
 * Reads and checks what is in a folder. `reader` is who must be able to read its files, null for this process's own user:
 * QEMU opens them once more, as the user that it runs as.
 *
 * @throws {Error} what is wrong with it
 */
export function readImage(name: string, folder: string, reader: Owner | null): Image {
  const parsed = v.safeParse(Description, description(folder, reader));
  if (!parsed.success) {
    const [issue] = parsed.issues;
    throw new Error(`${FILE}: ${v.getDotPath(issue) ?? "it"}: ${issue.message}`);
  }
  const { kernel, initrd, disk, ...rest } = parsed.output;
  const verified = (path: string, kind: Kind) => {
    look(folder, path, reader, (file) => verify(file, kind, reader));
    return join(folder, path);
  };
  return {
    ...rest,
    name,
    folder,
    kernel: verified(kernel, KINDS.kernel),
    initrd: initrd === undefined ? null : verified(initrd, KINDS.initrd),
    disk: disk ? { file: verified(disk.file, KINDS[disk.format]), format: disk.format } : null,
  };
}

function description(folder: string, reader: Owner | null): unknown {
  const text = look(folder, FILE, reader, (file) => {
    if (fstatSync(file).size > MAX_DESCRIPTION) throw new Error(`is of more than ${MAX_DESCRIPTION} bytes`);
    return readFileSync(file, "utf8");
  });
  try {
    return parseToml(text);
  } catch (error) {
    // What comes after it shows the lines around.
    throw new Error(`${FILE}: ${messageOf(error).split("\n")[0]}`, { cause: error });
  }
}

/** Has `work` look at a file of the folder. @throws what is wrong with it */
function look<T>(folder: string, path: string, reader: Owner | null, work: (file: number) => T): T {
  const file = openImageFile(folder, path, reader);
  try {
    return work(file);
  } catch (error) {
    throw new Error(`${join(folder, path)} ${messageOf(error)}`, { cause: error });
  } finally {
    closeSync(file);
  }
}

/**
 * Opens a file of the folder. A link may lead out of it, to what the reader could look at without us. Who may change the
 * folder may do so meanwhile: what counts is what was opened.
 */
export function openImageFile(folder: string, path: string, reader: Owner | null): number {
  const named = join(folder, path);
  let file: number | undefined;
  try {
    // Of a pipe, nobody waits for the other end.
    file = openSync(named, constants.O_RDONLY | constants.O_NONBLOCK);
    const real = readlinkSync(`/proc/self/fd/${file}`);
    if (reader && !real.startsWith(realpathSync(folder) + sep) && !mayReach(reader, real)) {
      throw new Error(`is a link to what user ${reader.uid}, as whom QEMU runs, cannot reach`);
    }
    if (!fstatSync(file).isFile()) throw new Error("is no file");
    return file;
  } catch (error) {
    if (file !== undefined) closeSync(file);
    const missing = (error as NodeJS.ErrnoException).code === "ENOENT";
    throw new Error(`${named} ${missing ? "is missing" : messageOf(error)}`, { cause: error });
  }
}

/** By its first bytes, so that what is missing or cut short is told before anything is made of it. */
function verify(file: number, { what, magics, refuse }: Kind, reader: Owner | null): void {
  const stat = fstatSync(file);
  if (stat.size === 0) throw new Error("is empty");
  if (reader && !mayRead(reader, stat)) throw new Error(`cannot be read by user ${reader.uid}, as whom QEMU runs`);
  const head = Buffer.alloc(HEAD);
  readSync(file, head, 0, HEAD, 0);
  const begins = ([offset, magic]: readonly [number, string]) =>
    head.toString("latin1", offset, offset + magic.length) === magic;
  if (!magics.some(begins)) throw new Error(`is not ${what}`);
  const reason = refuse?.(head);
  if (reason !== undefined) throw new Error(reason);
}

export function mayRead(owner: Owner, stat: Stats): boolean {
  return may(owner, READ, stat);
}

function mayReach(owner: Owner, path: string): boolean {
  for (let [at, right] = [path, READ];; [at, right] = [dirname(at), SEARCH]) {
    if (!may(owner, right, statSync(at))) return false;
    if (at === dirname(at)) return true;
  }
}

function may({ uid, gid }: Owner, right: number, { mode, uid: user, gid: group }: Stats): boolean {
  return uid === 0 || (mode >> (user === uid ? 6 : group === gid ? 3 : 0) & right) !== 0;
}

/**
 * A disk that is made of other files would have those read too, which nobody has checked. By the header of
 * https://www.qemu.org/docs/master/interop/qcow2.html: where the name of a backing file is, and incompatible features.
 */
function needsAnother(head: Buffer): string | undefined {
  if (head.readBigUInt64BE(8) !== 0n) return "is built on another file";
  const EXTERNAL_DATA = 4n;
  const features = head.readUInt32BE(4) >= 3 ? head.readBigUInt64BE(72) : 0n;
  return (features & EXTERNAL_DATA) === 0n ? undefined : "has its data in another file";
}
