import type { PathInfo } from "./contracts.ts";

/** What is told of a path at which there is nothing. */
export const ABSENT: PathInfo = {
  exists: false,
  is_dir: false,
  is_file: false,
  is_symlink: false,
  link_target: null,
  mode: 0,
  size: 0,
};
