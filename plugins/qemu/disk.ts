import { existsSync } from "node:fs";
import { rename, rm } from "node:fs/promises";
import { DormouseError } from "../../main.ts";
import { run } from "../shared/run.ts";
import { formatSize, parseSize } from "../shared/size.ts";
import type { Image } from "./images.ts";

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
  await rename(unfinished, file);
}

/**
 * A disk that ends before its image's would cut off what is on that one.
 *
 * @throws {DormouseError} `invalid_size`
 */
export async function refuseSmaller({ file, format }: NonNullable<Image["disk"]>, size?: string | boolean) {
  const bytes = typeof size === "string" ? parseSize(size) : undefined;
  if (bytes === undefined) return;
  const info = JSON.parse(await run("qemu-img", ["info", "--output=json", "-U", "-f", format, file]));
  const least: number = info["virtual-size"];
  if (bytes >= least) return;
  const message = `Wrong value of "overlay_size": the disk of its image has ${formatSize(least)}`;
  throw new DormouseError("invalid_size", message, { details: { field: "overlay_size" } });
}

/** Copies the layer of a machine that does not run, sharing its blocks where the file system can. */
export async function copyOverlay(from: string, to: string): Promise<void> {
  await rm(`${to}.tmp`, { force: true });
  await run("cp", ["--reflink=auto", "--sparse=always", from, `${to}.tmp`], { timeout: COPY_MS });
  await rename(`${to}.tmp`, to);
}
