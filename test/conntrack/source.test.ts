import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { test } from "node:test";
import { execa } from "execa";
import { lacking } from "../helpers.ts";

const HERE = import.meta.dirname!;
const programs = ["ip", "nft", "conntrack", "unshare", "setpriv", "bash"];
const folders = (process.env.PATH ?? "").split(":");
const missing = programs.find((name) => !folders.some((folder) => existsSync(join(folder, name))));
const root = process.platform === "linux" && process.getuid?.() === 0;
const skip = lacking(!root ? "it needs root on Linux" : missing ? `there is no ${missing}` : null);

/** Runs a file of tests in a network namespace of its own, whose conntrack table holds only what the tests do. */
async function inside(file: string): Promise<void> {
  const tests = "Deno" in globalThis
    ? [process.execPath, "test", "-A", "--quiet", join(HERE, file)]
    : [process.execPath, join(HERE, file)];
  // Node's runner tells its children by this variable to report in a binary format.
  const { NODE_TEST_CONTEXT: _, ...env } = process.env;
  const { exitCode, all } = await execa("unshare", [
    "--net",
    "sh",
    "-c",
    'ip link set lo up && exec "$@"',
    "sh",
    ...tests,
  ], {
    env: { ...env, NO_COLOR: "1" },
    extendEnv: false,
    reject: false,
    all: true,
    timeout: 120_000,
    stdin: "ignore",
  });
  assert.equal(exitCode, 0, all);
}

test(
  "the sources tell what the kernel does, and come back from whatever ends them",
  { skip },
  () => inside("kernel.ts"),
);
