import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { test } from "node:test";
import { execa } from "execa";
import { unsupported } from "../../plugins/network/bridge.ts";
import { lacking } from "../helpers.ts";

const programs = ["ip", "ss", "nft", "conntrack", "unshare"];
const folders = (process.env.PATH ?? "").split(":");
const missing = programs.find((name) => !folders.some((folder) => existsSync(join(folder, name))));
const skip = lacking(unsupported() ?? (missing ? `there is no ${missing}` : null));

// A network, names of namespaces and a view of its devices that nobody else has, over the cgroups of this machine.
const PREPARE = `
mkdir -p /run/netns /run/dormouse-test-cgroup &&
mount -t tmpfs dormouse /run/netns &&
mount --rbind /sys/fs/cgroup /run/dormouse-test-cgroup &&
mount -t sysfs dormouse /sys &&
mount --rbind /run/dormouse-test-cgroup /sys/fs/cgroup &&
ip link set lo up &&
exec "$@"
`;

// I16.
test("probes of real processes keep nobody awake and wake nobody", { skip }, async () => {
  const file = join(import.meta.dirname!, "kernel.ts");
  const tests = "Deno" in globalThis
    ? [process.execPath, "test", "-A", "--no-check", "--quiet", file]
    : [process.execPath, file];
  // Node's runner tells its children by this variable to report in a binary format.
  const { NODE_TEST_CONTEXT: _, ...env } = process.env;
  const { exitCode, all } = await execa("unshare", ["--net", "--mount", "sh", "-c", PREPARE, "sh", ...tests], {
    env: { ...env, NO_COLOR: "1" },
    extendEnv: false,
    reject: false,
    all: true,
    timeout: 120_000,
    stdin: "ignore",
  });
  assert.equal(exitCode, 0, all);
});
