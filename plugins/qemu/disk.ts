import { existsSync } from "node:fs";
import { rename, rm } from "node:fs/promises";
import { DormouseError } from "../../main.ts";
import { messageOf } from "../shared/errors.ts";
import { CommandError, run } from "../shared/run.ts";
import { formatSize, parseSize } from "../shared/size.ts";
import type { Image } from "./image.ts";
import { syncData } from "./memory.ts";

/** Milliseconds in which a layer is copied. */
const COPY_MS = 300_000;

/**
 * Makes the layer that takes what an instance writes to its image's disk, unless it is there. The image's own file is
 * told anew at each start, so it may move.
 */
export async function makeOverlay(
  file: string,
  { file: base, format }: NonNullable<Image["disk"]>,
  size?: string | boolean,
): Promise<void> {
  if (existsSync(file)) return;
  const bytes = typeof size === "string" ? parseSize(size) : undefined;
  const unfinished = `${file}.tmp`;
  await rm(unfinished, { force: true });
  await run("qemu-img", [
    ...["create", "-q", "-f", "qcow2", "-b", base, "-F", format, unfinished],
    ...(bytes === undefined ? [] : [String(bytes)]),
  ]);
  await syncData(unfinished);
  await rename(unfinished, file);
}

/**
 * Refuses a disk that no layer can be made over, and a layer that ends before its disk, which would cut off what is on it.
 *
 * @throws {DormouseError} `invalid_image`, `invalid_size`
 */
export async function checkDisk({ file, format }: NonNullable<Image["disk"]>, size?: string | boolean): Promise<void> {
  const bytes = typeof size === "string" ? parseSize(size) : undefined;
  if (bytes === undefined && format === "raw") return;
  const least = await virtualSize(file, format);
  if (bytes === undefined || bytes >= least) return;
  const message = `Wrong value of "overlay_size": the disk of its image has ${formatSize(least)}`;
  throw new DormouseError("invalid_size", message, { details: { field: "overlay_size" } });
}

async function virtualSize(file: string, format: string): Promise<number> {
  try {
    const info = await run("qemu-img", ["info", "--output=json", "-U", "-f", format, file]);
    return JSON.parse(info)["virtual-size"];
  } catch (error) {
    if (!(error instanceof CommandError)) throw error;
    const message = `Cannot use disk "${file}": ${error.stderr.trim() || messageOf(error)}`;
    throw new DormouseError("invalid_image", message, { cause: error });
  }
}

/** Copies the layer of a machine that does not run, sharing its blocks where the file system can. */
export async function copyOverlay(from: string, to: string): Promise<void> {
  await rm(`${to}.tmp`, { force: true });
  await run("cp", ["--reflink=auto", "--sparse=always", from, `${to}.tmp`], { timeout: COPY_MS });
  await syncData(`${to}.tmp`); // it may belong to a memory that is on disk
  await rename(`${to}.tmp`, to);
}
