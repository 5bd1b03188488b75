import { closeSync, constants, existsSync, fstatSync, readdirSync, realpathSync } from "node:fs";
import { chmod, chown, copyFile, mkdir, mkdtemp, rename, rm } from "node:fs/promises";
import { dirname, isAbsolute, join, relative, resolve } from "node:path";
import process from "node:process";
import { DormouseError } from "../../main.ts";
import { messageOf } from "../shared/errors.ts";
import { didYouMean } from "../shared/nearest.ts";
import { FILE, type Image, mayRead, openImageFile, readImage } from "./image.ts";
import type { Owner } from "./records.ts";

const NAME = /^(?=.{1,100}$)[a-z0-9]([a-z0-9._-]*[a-z0-9])?$/;
/** What {@linkcode Images.add} and {@linkcode Images.remove} work in, of the name that comes before it. */
const UNFINISHED = /^\..+\.(?:copy|gone)-\w{6}$/;
/** The image that Dormouse can build itself. */
export const DEMO = "demo";

/** The images of a host: folders with an `image.toml`, in `data_dir/images` by name or anywhere by absolute path. */
export class Images {
  readonly #folder: string;
  readonly #reader: Owner | null;

  /** `reader` as for {@linkcode readImage}. */
  constructor(folder: string, reader: Owner | null = null) {
    this.#folder = folder;
    this.#reader = reader;
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
    return this.#check(reference, folder);
  }

  /** As {@linkcode Images.read}, by name alone. */
  readNamed(name: string): Image {
    if (isAbsolute(name)) throw new DormouseError("image_not_found", `No image "${name}": expected a name`);
    return this.read(name);
  }

  #check(reference: string, folder: string): Image {
    try {
      return readImage(reference, folder, this.#reader);
    } catch (error) {
      const message = `Cannot use image "${reference}": ${messageOf(error)}`;
      throw new DormouseError("invalid_image", message, { cause: error });
    }
  }

  #hint(reference: string): string {
    if (isAbsolute(reference)) return "";
    return reference === DEMO ? `: "deno task image:demo" builds it` : didYouMean(reference, this.names());
  }

  /**
   * Copies what a folder of this machine has of an image to be the image `name`; complete or not at all.
   *
   * @throws {DormouseError} `invalid_image`, `image_not_found`, `name_conflict`
   */
  async add(name: string, path: string): Promise<Image> {
    if (!NAME.test(name)) throw new DormouseError("invalid_image", `Wrong image name "${name.slice(0, 200)}"`);
    if (!isAbsolute(path)) throw new DormouseError("invalid_image", `Wrong path "${path}": expected an absolute path`);
    const { folder: from, kernel, initrd, disk } = this.read(path);
    const files = [join(from, FILE), kernel, initrd, disk?.file ?? null].filter((file) => file !== null);
    const folder = join(this.#folder, name);
    if (existsSync(folder)) throw new DormouseError("name_conflict", `Cannot add image "${name}": it is there already`);
    await mkdir(this.#folder, { recursive: true });
    const copy = await mkdtemp(join(this.#folder, `.${name}.copy-`));
    try {
      for (const file of files) {
        const to = join(copy, name, relative(from, file));
        await mkdir(dirname(to), { recursive: true });
        await copyImageFile(from, relative(from, file), to, this.#reader);
      }
      this.#check(name, join(copy, name));
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

/** What a link leads to, for the copy is to do without that; for QEMU to read, and for nobody to write. */
async function copyImageFile(folder: string, path: string, to: string, reader: Owner | null): Promise<void> {
  const file = openImageFile(folder, path, reader);
  try {
    if (reader && path !== FILE && !mayRead(reader, fstatSync(file))) {
      throw new Error(`${path} cannot be read any more`);
    }
    await copyFile(`/proc/self/fd/${file}`, to, constants.COPYFILE_FICLONE); // by reflink where it can
    if (!reader) return;
    await chown(to, process.getuid!(), reader.gid);
    await chmod(to, 0o640);
  } finally {
    closeSync(file);
  }
}

/** The folder that holds an image's folder, for those who build one. */
export function imagesFolder(dataDir: string): string {
  return join(dataDir, "images");
}
