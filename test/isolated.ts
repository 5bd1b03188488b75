/** Tests that need a network of their own: run as another process, which the machine's own network never sees. */
import assert from "node:assert/strict";
import process from "node:process";
import { execa } from "execa";
import { unsupported } from "../plugins/network/bridge.ts";
import { missingProgram } from "../plugins/shared/programs.ts";

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

/** What this machine lacks for that, the programs of the test's own included; null where nothing is missing. */
export function lackingNetwork(...programs: string[]): string | null {
  const missing = missingProgram(["ip", "nft", "conntrack", "unshare", ...programs]);
  return unsupported() ?? (missing ? `there is no ${missing}` : null);
}

export interface IsolatedOptions {
  /** Milliseconds. */
  timeout: number;
  /** Besides this process's own variables. */
  env?: Record<string, string>;
}

/** Runs a file of tests on this runtime in a network that ends with it; returns what it printed. Fails where it does. */
export async function inOwnNetwork(path: string, { timeout, env: more = {} }: IsolatedOptions): Promise<string> {
  const tests = "Deno" in globalThis
    ? [process.execPath, "test", "-A", "--no-check", "--quiet", path]
    : [process.execPath, path];
  // Node's runner tells its children by this variable to report in a binary format.
  const { NODE_TEST_CONTEXT: _, ...env } = process.env;
  const { exitCode, all } = await execa("unshare", ["--net", "--mount", "sh", "-c", PREPARE, "sh", ...tests], {
    env: { ...env, ...more, NO_COLOR: "1" },
    extendEnv: false,
    reject: false,
    all: true,
    timeout,
    stdin: "ignore",
  });
  assert.equal(exitCode, 0, all);
  return all;
}
