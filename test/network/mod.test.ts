import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { test } from "node:test";
import { execa } from "execa";
import { unsupported } from "../../plugins/network/bridge.ts";
import { lacking } from "../helpers.ts";

const HERE = import.meta.dirname!;
const programs = ["ip", "nft", "conntrack", "unshare", "setpriv", "ping", "bash"];
const folders = (process.env.PATH ?? "").split(":");
const missing = programs.find((name) => !folders.some((folder) => existsSync(join(folder, name))));
const lacks = unsupported() ?? (missing ? `there is no ${missing}` : null);
const skip = lacking(lacks);
const skip6 = lacking(lacks ?? (existsSync("/proc/sys/net/ipv6") ? null : "the kernel has no IPv6"));

/**
 * Runs a file of tests as a process of its own, in a network and with names of namespaces that nobody else sees and that
 * end with it: the machine's own are never touched.
 */
async function inside(file: string): Promise<void> {
  const tests = "Deno" in globalThis
    ? [process.execPath, "test", "-A", "--no-check", "--quiet", join(HERE, file)]
    : [process.execPath, join(HERE, file)];
  const prepare = 'mkdir -p /run/netns && mount -t tmpfs dormouse /run/netns && ip link set lo up && exec "$@"';
  // Node's runner tells its children by this variable to report in a binary format.
  const { NODE_TEST_CONTEXT: _, ...env } = process.env;
  const { exitCode, all } = await execa("unshare", ["--net", "--mount", "sh", "-c", prepare, "sh", ...tests], {
    env: { ...env, NO_COLOR: "1" },
    extendEnv: false,
    reject: false,
    all: true,
    timeout: 120_000,
    stdin: "ignore",
  });
  assert.equal(exitCode, 0, all);
}

test("the network connects instances with the host, each other and the world", { skip }, () => inside("traffic.ts"));
test("the network does the same over IPv6", { skip: skip6 }, () => inside("traffic6.ts"));
test("the network repairs, reconciles, refuses and leaves no trace", { skip }, () => inside("upkeep.ts"));
test("the network says why it is off where it cannot work", { skip }, () => inside("off.ts"));
