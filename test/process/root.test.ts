import assert from "node:assert/strict";
import { mkdirSync, realpathSync, symlinkSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { test, type TestContext } from "node:test";
import { findIn, pathInfo } from "../../plugins/process/root.ts";
import { temporaryFolder } from "../helpers.ts";

function rootFolder(t: TestContext): string {
  const root = realpathSync(temporaryFolder(t));
  mkdirSync(join(root, "usr/bin"), { recursive: true });
  writeFileSync(join(root, "usr/bin/tool"), "12345", { mode: 0o755 });
  const links = {
    "bin": "usr/bin",
    "absolute": "/usr/bin/tool",
    "outside": "../../../../../../etc/passwd",
    "host": "/etc/passwd",
    "up": "usr/bin/../..",
    "loop": "loop",
    "usr/back": "..",
    "broken": "no-such-file",
    "tail": "usr/",
  };
  for (const [name, target] of Object.entries(links)) symlinkSync(target, join(root, name));
  return root;
}

test("findIn() finds what a process of that root would", (t) => {
  const root = rootFolder(t);
  const cases: Record<string, string | undefined> = {
    "/": "",
    "/usr/bin/tool": "usr/bin/tool",
    "usr//bin/./tool": "usr/bin/tool",
    "/bin/tool": "usr/bin/tool",
    "/absolute": "usr/bin/tool",
    "/../../usr": "usr",
    "/up/usr": "usr",
    "/usr/back/bin/tool": "usr/bin/tool",
    "/tail/bin": "usr/bin",
    "/usr/bin/tool/more": undefined,
    "/usr/bin/tool/..": undefined,
    "/broken": undefined,
    // Neither leads out of the root, where there is no /etc.
    "/outside": undefined,
    "/host": undefined,
    "/etc/passwd": undefined,
  };
  for (const [path, expected] of Object.entries(cases)) {
    assert.equal(findIn(root, path)?.path, expected === undefined ? undefined : join(root, expected), path);
  }
  assert.throws(() => findIn(root, "/loop"), /too many links/);
});

test("pathInfo() tells a link from what it leads to", (t) => {
  const root = rootFolder(t);
  const file = {
    exists: true,
    is_dir: false,
    is_file: true,
    is_symlink: false,
    link_target: null,
    mode: 0o755,
    size: 5,
  };
  assert.deepEqual(pathInfo(root, "/absolute", true), file);
  const { mode: _, size: __, ...link } = pathInfo(root, "/absolute", false);
  assert.deepEqual(link, {
    exists: true,
    is_dir: false,
    is_file: false,
    is_symlink: true,
    link_target: "/usr/bin/tool",
  });
  assert.equal(pathInfo(root, "/bin", true).is_dir, true);
  assert.deepEqual(pathInfo(root, "/outside", true), {
    exists: false,
    is_dir: false,
    is_file: false,
    is_symlink: false,
    link_target: null,
    mode: 0,
    size: 0,
  });
});
