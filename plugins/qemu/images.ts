import { closeSync, existsSync, openSync, readdirSync, readFileSync, readSync, realpathSync, statSync } from "node:fs";
import { cp, mkdir, mkdtemp, rename, rm } from "node:fs/promises";
import { isAbsolute, join, normalize, resolve } from "node:path";
import { parse as parseToml } from "smol-toml";
import * as v from "valibot";
import { DormouseError } from "../../main.ts";
import { messageOf } from "../shared/errors.ts";
import { didYouMean } from "../shared/nearest.ts";
import { size } from "../shared/schemas.ts";

const NAME = /^[a-z0-9]([a-z0-9._-]*[a-z0-9])?$/;
const FILE = "image.toml";
/** What {@linkcode Images.add} and {@linkcode Images.remove} work in, of the name that comes before it. */
const UNFINISHED = /^\..+\.(?:copy|gone)-\w{6}$/;
/** The image that Dormouse can build itself. */
export const DEMO = "demo";

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
  cmdline: v.optional(v.string(), ""),
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

/** The begin of a file by which its kind is known: at `offset`, one of these bytes. */
const KINDS = {
  kernel: { what: "a Linux kernel (bzImage or ELF)", magics: [[0x202, "HdrS"], [0, "\x7fELF"]] },
  initrd: {
    what: "an initramfs (cpio, gzip, zstd, xz, lz4 or bzip2)",
    magics: [[0, "0707"], [0, "\x1f\x8b"], [0, "\x28\xb5\x2f\xfd"], [0, "\xfd7zXZ"], [0, "\x02\x21\x4c\x18"], [
      0,
      "BZh",
    ]],
  },
  qcow2: { what: "a qcow2 disk", magics: [[0, "QFI\xfb"]] },
} as const satisfies Record<string, { what: string; magics: readonly (readonly [number, string])[] }>;

/** The images of a host: folders with an `image.toml`, in `data_dir/images` by name or anywhere by absolute path. */
export class Images {
  readonly #folder: string;

  constructor(folder: string) {
    this.#folder = folder;
  }

  /** Names of all that are there, whole or not. */
  names(): string[] {
    if (!existsSync(this.#folder)) return [];
    const entries = readdirSync(this.#folder, { withFileTypes: true });
    return entries.filter((entry) => entry.isDirectory() && NAME.test(entry.name)).map(({ name }) => name).toSorted();
  }

  pathOf(reference: string): string {
    return isAbsolute(reference) ? resolve(reference) : join(this.#folder, reference);
  }

  /** Whether two references are of one folder, by whichever way they lead to it. */
  isSame(one: string, other: string): boolean {
    const [a, b] = [one, other].map((each) => this.pathOf(each));
    return a === b || (existsSync(a) && existsSync(b) && realpathSync(a) === realpathSync(b));
  }

  /**
   * Reads and checks an image, by name or absolute path.
   *
   * @throws {DormouseError} `image_not_found`, `invalid_image`
   */
  read(reference: string): Image {
    if (!isAbsolute(reference) && !NAME.test(reference)) {
      const message = `Wrong image "${reference.slice(0, 200)}": expected a name or an absolute path`;
      throw new DormouseError("invalid_image", message);
    }
    const folder = this.pathOf(reference);
    if (!existsSync(folder)) {
      throw new DormouseError("image_not_found", `No image "${reference}"${this.#hint(reference)}`);
    }
    try {
      return check(reference, folder);
    } catch (error) {
      if (error instanceof DormouseError) throw error;
      throw new DormouseError("invalid_image", `Cannot use image "${reference}": ${messageOf(error)}`, {
        cause: error,
      });
    }
  }

  #hint(reference: string): string {
    if (isAbsolute(reference)) return "";
    return reference === DEMO ? `: "deno task image:demo" builds it` : didYouMean(reference, this.names());
  }

  /**
   * Copies a folder of this machine to be the image `name`; complete or not at all.
   *
   * @throws {DormouseError} `invalid_image`, `image_not_found`, `name_conflict`
   */
  async add(name: string, path: string): Promise<Image> {
    if (!NAME.test(name)) throw new DormouseError("invalid_image", `Wrong image name "${name.slice(0, 200)}"`);
    if (!isAbsolute(path)) throw new DormouseError("invalid_image", `Wrong path "${path}": expected an absolute path`);
    this.read(path);
    const folder = join(this.#folder, name);
    if (existsSync(folder)) throw new DormouseError("name_conflict", `Cannot add image "${name}": it is there already`);
    await mkdir(this.#folder, { recursive: true });
    const copy = await mkdtemp(join(this.#folder, `.${name}.copy-`));
    try {
      // COPYFILE_FICLONE: by reflink where it can. A link would lead back to what the copy is to do without.
      await cp(path, join(copy, name), { recursive: true, dereference: true, mode: 2 });
      await rename(join(copy, name), folder).catch((error) => {
        if (!["EEXIST", "ENOTEMPTY"].includes(error.code)) throw error;
        throw new DormouseError("name_conflict", `Cannot add image "${name}": it is there already`, { cause: error });
      });
    } finally {
      await rm(copy, { recursive: true, force: true });
    }
    return this.read(name);
  }

  /** Removes an image by name. @throws {DormouseError} `image_not_found` */
  async remove(name: string): Promise<void> {
    const folder = join(this.#folder, name);
    if (!NAME.test(name) || !existsSync(folder)) throw new DormouseError("image_not_found", `No image "${name}"`);
    // First out of sight, so that nobody begins with half of it.
    const gone = await mkdtemp(join(this.#folder, `.${name}.gone-`));
    await rename(folder, join(gone, name));
    await rm(gone, { recursive: true, force: true });
  }

  /** Removes what a host that died has left of either. Not while either is under way. */
  async sweep(): Promise<void> {
    const entries = existsSync(this.#folder) ? readdirSync(this.#folder) : [];
    for (const name of entries.filter((each) => UNFINISHED.test(each))) {
      await rm(join(this.#folder, name), { recursive: true, force: true });
    }
  }
}

function check(name: string, folder: string): Image {
  const text = readFileSync(join(folder, FILE), "utf8");
  const parsed = v.safeParse(Description, parseToml(text));
  if (!parsed.success) {
    const [issue] = parsed.issues;
    throw new Error(`${FILE}: ${v.getDotPath(issue) ?? "it"}: ${issue.message}`);
  }
  const { kernel, initrd, disk, ...rest } = parsed.output;
  const at = (path: string) => join(folder, path);
  verify(at(kernel), KINDS.kernel);
  if (initrd !== undefined) verify(at(initrd), KINDS.initrd);
  if (disk) verify(at(disk.file), disk.format === "qcow2" ? KINDS.qcow2 : { what: "a disk", magics: [] });
  return {
    ...rest,
    name,
    folder,
    kernel: at(kernel),
    initrd: initrd === undefined ? null : at(initrd),
    disk: disk ? { file: at(disk.file), format: disk.format } : null,
  };
}

/** By its first bytes, so that what is missing or cut short is told before anything is made of it. */
function verify(path: string, kind: { what: string; magics: readonly (readonly [number, string])[] }): void {
  const stat = statSync(path, { throwIfNoEntry: false });
  if (!stat?.isFile()) throw new Error(`${path} is missing`);
  if (stat.size === 0) throw new Error(`${path} is empty`);
  if (kind.magics.length === 0) return;
  const head = new Uint8Array(0x210);
  const file = openSync(path, "r");
  try {
    readSync(file, head, 0, head.length, 0);
  } finally {
    closeSync(file);
  }
  const begins = (offset: number, magic: string) => [...magic].every((c, i) => head[offset + i] === c.charCodeAt(0));
  if (!kind.magics.some(([offset, magic]) => begins(offset, magic))) throw new Error(`${path} is not ${kind.what}`);
}

/** The folder that holds an image's folder, for those who build one. */
export function imagesFolder(dataDir: string): string {
  return join(dataDir, "images");
}
