import { accessSync, constants, existsSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";

/** The whole environment of a program that this host runs and does not trust with its own. */
export function bareEnvironment(): { PATH: string; LC_ALL: string } {
  return { PATH: searchPath(), LC_ALL: "C" };
}

/** Where this host looks for programs. */
export function searchPath(): string {
  return process.env.PATH ?? "/usr/sbin:/usr/bin:/sbin:/bin";
}

/** The first of these programs that is not in PATH. */
export function missingProgram(programs: readonly string[]): string | undefined {
  const folders = searchPath().split(":").filter(Boolean);
  return programs.find((name) => !folders.some((folder) => isProgram(join(folder, name))));
}

function isProgram(file: string): boolean {
  if (!existsSync(file)) return false;
  try {
    accessSync(file, constants.X_OK);
    return true;
  } catch {
    return false; // somebody else's
  }
}
