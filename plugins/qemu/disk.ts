import { existsSync } from "node:fs";
import { rename, rm } from "node:fs/promises";
import { run } from "../shared/run.ts";
import { parseSize } from "../shared/size.ts";
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

/** Copies the layer of a machine that does not run, sharing its blocks where the file system can. */
export async function copyOverlay(from: string, to: string): Promise<void> {
  await rm(`${to}.tmp`, { force: true });
  await run("cp", ["--reflink=auto", "--sparse=always", from, `${to}.tmp`], { timeout: COPY_MS });
  await rename(`${to}.tmp`, to);
}
