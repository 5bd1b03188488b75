import assert from "node:assert/strict";
import { join } from "node:path";
import process from "node:process";
import { test } from "node:test";
import { execa } from "execa";
import { unsupported } from "../../plugins/network/bridge.ts";
import { lacking } from "../helpers.ts";

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

test("instances run in the network that was made for them", { skip: lacking(unsupported()) }, async () => {
  const file = join(import.meta.dirname!, "networked.ts");
  const tests = "Deno" in globalThis
    ? [process.execPath, "test", "-A", "--no-check", "--quiet", file]
    : [process.execPath, file];
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
