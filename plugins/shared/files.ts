import { readFileSync } from "node:fs";
import { rm } from "node:fs/promises";
import { delay } from "./async.ts";

/** How often a folder is tried to be removed in which somebody still makes files, and milliseconds before the next time. */
const [TRIES, PAUSE_MS] = [10, 20];

/** What is in a file, as text; undefined where there is none, which may be so from one moment to the next. */
export function readIfThere(file: string): string | undefined {
  try {
    return readFileSync(file, "utf8");
  } catch (error) {
    // The second is a process's, one that has just ended.
    if (["ENOENT", "ESRCH"].includes((error as NodeJS.ErrnoException).code ?? "")) return undefined;
    throw error;
  }
}

/** Removes a folder and all in it; what is made in it meanwhile, by who is about to end, goes as well. */
export async function removeFolder(folder: string): Promise<void> {
  // `maxRetries` of rm() does this, but not on Deno.
  for (let tries = 1;; tries++) {
    try {
      return await rm(folder, { recursive: true, force: true });
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== "ENOTEMPTY" || tries === TRIES) throw error;
      await delay(tries * PAUSE_MS);
    }
  }
}
