import { readFileSync } from "node:fs";

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
