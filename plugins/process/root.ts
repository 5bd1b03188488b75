import { lstatSync, readlinkSync, type Stats } from "node:fs";
import { join } from "node:path";
import type { PathInfo } from "../../main.ts";
import { ABSENT } from "../shared/absent.ts";

/** As many symbolic links as Linux follows. */
const MAX_LINKS = 40;

/** A path that was found below a root. */
export interface Found {
  /** The path for this process, without symbolic links but perhaps its last part. */
  readonly path: string;
  readonly stats: Stats;
}

/**
 * Finds an absolute path as a process would whose root directory is `root`: neither `..` nor a symbolic link leads out of
 * it. Undefined where there is nothing. `follow` is about the last part only, the others are always followed.
 *
 * @throws `EACCES` and the like, and an error with the code `ELOOP`
 */
export function findIn(root: string, path: string, { follow = true } = {}): Found | undefined {
  const waiting = path.split("/").reverse();
  const walked: string[] = [];
  let links = 0;
  for (let part = waiting.pop(); part !== undefined; part = waiting.pop()) {
    if (part === "" || part === ".") continue;
    if (part === "..") {
      walked.pop();
      continue;
    }
    const here = join(root, ...walked, part);
    const stats = lookAt(here);
    if (!stats) return undefined;
    if (!stats.isSymbolicLink() || (waiting.every((rest) => rest === "") && !follow)) {
      // Only a folder has a "..", or anything else below it.
      if (waiting.length > 0 && !stats.isDirectory()) return undefined;
      walked.push(part);
      continue;
    }
    if (++links > MAX_LINKS) throw Object.assign(new Error(`Cannot find "${path}": too many links`), { code: "ELOOP" });
    const target = targetOf(here) ?? part; // which is looked at again
    if (target.startsWith("/")) walked.length = 0;
    waiting.push(...target.split("/").reverse());
  }
  const found = join(root, ...walked);
  const stats = lookAt(found);
  return stats && { path: found, stats };
}

/** What the API tells of a path below `root`. */
export function pathInfo(root: string, path: string, follow: boolean): PathInfo {
  const found = findIn(root, path, { follow });
  if (!found) return ABSENT;
  const { stats } = found;
  const is_symlink = stats.isSymbolicLink();
  const link_target = is_symlink ? targetOf(found.path) : null;
  if (link_target === undefined) return pathInfo(root, path, follow);
  return {
    exists: true,
    is_dir: stats.isDirectory(),
    is_file: stats.isFile(),
    is_symlink,
    link_target,
    mode: stats.mode & 0o7777,
    size: stats.size,
  };
}

/** Where a link leads to; undefined where it has become something else, or nothing. */
function targetOf(link: string): string | undefined {
  try {
    return readlinkSync(link);
  } catch (error) {
    if (["ENOENT", "ENOTDIR", "EINVAL"].includes((error as NodeJS.ErrnoException).code ?? "")) return undefined;
    throw error;
  }
}

function lookAt(path: string): Stats | undefined {
  try {
    return lstatSync(path);
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code === "ENOENT" || code === "ENOTDIR") return undefined;
    throw error;
  }
}
