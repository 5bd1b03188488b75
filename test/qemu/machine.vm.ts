import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { test } from "node:test";
import { execa } from "execa";
import { unsupported } from "../../plugins/network/bridge.ts";
import { lacking } from "../helpers.ts";
import { demoImage, skipGuest } from "./guest.ts";

const programs = ["ip", "nft", "conntrack", "unshare", "setpriv", "qemu-img"];
const folders = (process.env.PATH ?? "").split(":");
const missing = programs.find((name) => !folders.some((folder) => existsSync(join(folder, name))));
const skip = skipGuest || lacking(unsupported() ?? (missing ? `there is no ${missing}` : null));

// A network and a view of its devices that nobody else has.
const PREPARE = `
mkdir -p /run/netns &&
mount -t tmpfs dormouse /run/netns &&
mount -t sysfs dormouse /sys &&
ip link set lo up &&
exec "$@"
`;

test("machines answer, sleep, wake and outlive their host", { skip, timeout: 300_000 }, async (t) => {
  const image = await demoImage();
  const path = join(import.meta.dirname!, "machine-host.ts");
  const tests = "Deno" in globalThis
    ? [process.execPath, "test", "-A", "--no-check", "--quiet", path]
    : [process.execPath, path];
  // Node's runner tells its children by this variable to report in a binary format.
  const { NODE_TEST_CONTEXT: _, ...env } = process.env;
  const { exitCode, all } = await execa("unshare", ["--net", "--mount", "sh", "-c", PREPARE, "sh", ...tests], {
    env: { ...env, NO_COLOR: "1", DORMOUSE_TEST_IMAGE: image },
    extendEnv: false,
    reject: false,
    all: true,
    timeout: 240_000,
    stdin: "ignore",
  });
  assert.equal(exitCode, 0, all);
  for (const [seen] of all.matchAll(/^.*\bseen: .*$/gm)) t.diagnostic(seen);
});
