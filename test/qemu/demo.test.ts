import assert from "node:assert/strict";
import { existsSync, mkdirSync, readdirSync, readFileSync } from "node:fs";
import { connect } from "node:net";
import { once } from "node:events";
import { join } from "node:path";
import { test } from "node:test";
import { getLogger } from "@logtape/logtape";
import { parse } from "smol-toml";
import { Agent } from "../../plugins/qemu/agent.ts";
import { buildDemoImage } from "../../plugins/qemu/demo.ts";
import { execute } from "../../plugins/qemu/exec.ts";
import { cleanup, temporaryFolder } from "../helpers.ts";
import { boot, demoImage, type Machine, type Report, report, skipGuest } from "./guest.ts";

const log = getLogger("dormouse-test");

test("buildDemoImage() makes a complete folder, and never another in its place", { skip: skipGuest }, async () => {
  const folder = await demoImage();
  assert.deepEqual(readdirSync(folder).sort(), ["disk.raw", "image.toml", "initrd.img", "vmlinuz"]);
  const { kernel, initrd, disk, agent, ready_port } = parse(readFileSync(join(folder, "image.toml"), "utf8"));
  assert.deepEqual([kernel, initrd, agent, ready_port], ["vmlinuz", "initrd.img", true, 80]);
  assert.deepEqual({ ...disk as object }, { file: "disk.raw", format: "raw" });
  await assert.rejects(buildDemoImage(folder, { log }), /^Error: Cannot build image ".*": it is there already$/);
});

test("buildDemoImage() leaves nothing behind when it is aborted", { skip: skipGuest }, async (t) => {
  const images = join(temporaryFolder(t), "images");
  mkdirSync(images);
  const options = { log, cache: join(temporaryFolder(t), "cache"), signal: AbortSignal.abort(new Error("enough")) };
  await assert.rejects(buildDemoImage(join(images, "demo"), options));
  assert.deepEqual(readdirSync(images), []);
  assert.ok(!existsSync(join(images, "demo")));
});

/** How each machine ends: by its power button, and by the keys of a PC. */
const ENDINGS: Record<Machine, [string, Record<string, unknown>]> = {
  microvm: ["system_powerdown", {}],
  q35: ["send-key", { keys: ["ctrl", "alt", "delete"].map((data) => ({ type: "qcode", data })) }],
};

for (const machine of ["microvm", "q35"] as const) {
  test(
    `the demo image boots on ${machine}, counts its requests, keeps its disk and powers off`,
    { skip: skipGuest },
    async (t) => {
      const drive = `if=none,id=disk,file=${join(await demoImage(), "disk.raw")},format=raw,snapshot=on`;
      const args = ["-drive", drive, "-device", `virtio-blk-${machine === "microvm" ? "device" : "pci"},drive=disk`];
      const guest = await boot(t, { machine, hostname: "first", args });
      await using agent = new Agent(guest.agent);
      await agent.ready({ signal: AbortSignal.timeout(180_000) });
      const first = await report(guest);
      assert.deepEqual([first.hostname, first.requests, first.boots], ["first", 1, 1]);
      assert.ok(first.uptime > 0 && Math.abs(first.clock - Date.now()) < 60_000);

      // From within: the network in user space loses connections of a crowd.
      const crowd = "for n in $(seq 30); do wget -qO - http://127.0.0.1/ & done; wait";
      const { stdout } = await execute(agent, { command: ["sh", "-c", crowd], timeout_ms: 60_000, max_output: 10_000 });
      const seen = stdout.trim().split("\n").map((line) => (JSON.parse(line) as Report).requests);
      assert.deepEqual(seen.sort((a, b) => a - b), Array.from({ length: 30 }, (_, index) => index + 2));
      const cases: [string, RequestInit, number][] = [["nonesuch", {}, 404], ["", { method: "POST", body: "x" }, 405]];
      for (const [path, init, status] of cases) {
        const response = await fetch(`${guest.url}${path}`, init);
        await response.body?.cancel();
        assert.equal(response.status, status, path);
      }
      assert.equal((await report(guest)).requests, 32, "only answers count");

      const echo = connect(guest.echo, "127.0.0.1");
      cleanup(t).defer(() => void echo.destroy());
      echo.write("hello");
      assert.equal(String((await once(echo, "data"))[0]), "hello");
      echo.destroy();

      const events: string[] = [];
      using qmp = await guest.qmp({ onEvent: ({ event }) => events.push(event) });
      await qmp.execute(...ENDINGS[machine]);
      assert.equal(await guest.ended, 0);
      await qmp.closed;
      assert.ok(events.includes("SHUTDOWN"), String(events));
      assert.match(
        readFileSync(join(guest.folder, "serial.log"), "utf8"),
        /^demo guest first is up: 10\.0\.2\.15\/24 \r?$/m,
      );
    },
  );
}

// On a microvm the driver's own test sees it.
test("a panic of the demo guest on q35 is told, and ends it", { skip: skipGuest }, async (t) => {
  const guest = await boot(t, { machine: "q35" });
  await using agent = new Agent(guest.agent);
  await agent.ready({ signal: AbortSignal.timeout(180_000) });
  const events: string[] = [];
  using qmp = await guest.qmp({ onEvent: ({ event, data }) => events.push([event, data.reason].join(" ")) });
  const command = ["sh", "-c", "echo c >/proc/sysrq-trigger"];
  await assert.rejects(execute(agent, { command, timeout_ms: 20_000, max_output: 0 }));
  await guest.ended;
  await qmp.closed;
  assert.deepEqual(events, ["GUEST_PANICKED ", "SHUTDOWN guest-panic"]);
});
