// Run by mod.test.ts in a network of its own.
import assert from "node:assert/strict";
import { mkdirSync, symlinkSync } from "node:fs";
import { join } from "node:path";
import { test, type TestContext } from "node:test";
import { execa } from "execa";
import { run } from "../../plugins/shared/run.ts";
import { RUNTIME, temporaryFolder } from "../helpers.ts";
import { BRIDGE, configIn, traces } from "./world.ts";

/** Starts a host in a process that lacks something: `command` runs the rest of its arguments without it. */
async function hostUnder(t: TestContext, command: string[], env: Record<string, string> = {}) {
  const [program, ...args] = [...command, ...RUNTIME, join(import.meta.dirname!, "report.ts")];
  const { stdout, stderr } = await execa(program, [...args, configIn(temporaryFolder(t))], { env, stdin: "ignore" });
  const logged = stderr.split("\n").filter(Boolean).map((line) => JSON.parse(line));
  return { report: JSON.parse(stdout), logged };
}

test("the network is off, with one line in the log, when the machine lacks something", async (t) => {
  const onlyIp = join(temporaryFolder(t), "bin");
  mkdirSync(onlyIp);
  symlinkSync(await run("sh", ["-c", "command -v ip"]), join(onlyIp, "ip"));
  const readOnly = 'mount --bind /proc/sys /proc/sys && mount -o remount,ro,bind /proc/sys && exec "$@"';
  const cases: [string, string[], Record<string, string>, RegExp][] = [
    ["capabilities", ["setpriv", "--bounding-set=-all", "--inh-caps=-all"], {}, /^it needs root \(CAP_NET_ADMIN/],
    ["nft", [], { PATH: onlyIp }, /^Command "nft -f -" failed: no such program$/],
    ["ip", [], { PATH: "/nowhere" }, /^Command "ip -j .*" failed: no such program$/],
    ["a /proc to write to", ["unshare", "--mount", "sh", "-c", readOnly, "sh"], {}, /read-only/i],
  ];
  for (const [what, command, env, expected] of cases) {
    const { report, logged } = await hostUnder(t, command, env);
    assert.equal(report.enabled, false, what);
    assert.doesNotMatch(await traces(), new RegExp(BRIDGE), "nothing is left half made");
    assert.match(report.reason, expected, what);
    assert.match(report.allocate, /^Cannot allocate an address for instance "a": the network is off: /, what);
    assert.match(report.attach, /^Cannot attach instance "a": the network is off: /, what);
    assert.equal(report.release, "done", what);
    assert.equal(report.detach, "done", what);
    assert.equal(logged.length, 1, JSON.stringify(logged));
    assert.equal(logged[0].level, "WARN", what);
    assert.match(logged[0].message, /^The network is off, instances run on the host's own: /, what);
  }
  const { report, logged } = await hostUnder(t, []);
  assert.deepEqual([report.enabled, report.reason, logged], [true, null, []], "the same with nothing taken away");
  assert.match(await traces(), new RegExp(BRIDGE));
});

test("--purge-network says what it lacks", async (t) => {
  const folder = temporaryFolder(t);
  const main = join(import.meta.dirname!, "..", "..", "main.ts");
  const [program, ...args] = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", ...RUNTIME, main];
  const options = { reject: false, stdin: "ignore" as const };
  const { exitCode, stderr } = await execa(
    program,
    [...args, "--config", configIn(folder), "--purge-network"],
    options,
  );
  assert.equal(exitCode, 1);
  assert.match(stderr, /Cannot purge the network: it needs root/);
});
