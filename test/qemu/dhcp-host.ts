// Run by dhcp.test.ts in a network of its own: the real main.ts and the real dnsmasq, for real machines.
import assert from "node:assert/strict";
import { copyFileSync, readFileSync, writeFileSync } from "node:fs";
import { mkdir } from "node:fs/promises";
import { join } from "node:path";
import process from "node:process";
import { test } from "node:test";
import { parse, stringify } from "smol-toml";
import { readIfThere } from "../../plugins/shared/files.ts";
import { isAlive, type ProcessId, signalProcess } from "../../plugins/shared/proc.ts";
import { run } from "../../plugins/shared/run.ts";
import { freePort, until } from "../helpers.ts";
import { Host } from "../host.ts";
import type { Report } from "./guest.ts";

const [BRIDGE, GATEWAY] = ["dmqemu1", "10.132.0.1"];

interface Shown {
  id: string;
  state: string;
  network: { ip: string; mac: string };
}

/** The image `demo` as one that asks for its address. */
async function askingImage(folder: string): Promise<string> {
  const [demo, asking] = [process.env.DORMOUSE_TEST_IMAGE!, join(folder, "asking")];
  await mkdir(asking);
  for (const file of ["vmlinuz", "initrd.img", "disk.raw"]) copyFileSync(join(demo, file), join(asking, file));
  const description = parse(readFileSync(join(demo, "image.toml"), "utf8"));
  writeFileSync(join(asking, "image.toml"), stringify({ ...description, dhcp: true }));
  return asking;
}

/** A host whose machines ask for their addresses. */
class Asking extends Host {
  async runs(name: string): Promise<string> {
    const waited = await this.call<Shown>("GET", `/${name}/wait?state=Running&timeout=3m`);
    const { id } = await this.call<Shown>("GET", `/${name}`);
    const log = () => readFileSync(join(this.folder, "data", "qemu", "instances", id, "serial.log"), "latin1");
    assert.equal(waited.state, "Running", log());
    // It has its address before it says so.
    await until(`${name} tells of its address`, () => /has the address \S+\s/.test(log()));
    return log();
  }

  dnsmasq(): ProcessId | undefined {
    const text = readIfThere(join(this.folder, "data", "qemu", "dnsmasq.json"));
    return text === undefined ? undefined : JSON.parse(text);
  }
}

async function report(address: string): Promise<Report> {
  const response = await fetch(`http://${address}/`, { headers: { connection: "close" } });
  return await response.json();
}

test("machines that ask for their address get the one that the API tells", async (t) => {
  const host = new Asking(t, await freePort(), {
    store: {},
    network: { bridge: BRIDGE, subnet: "10.132.0.0/24" },
    hypervisor: { default_driver: "qemu-microvm" },
    qemu: { accel: "tcg", cgroup_parent: "dormouse-test" },
  });
  const image = await askingImage(host.folder);
  await host.start();
  assert.equal(host.dnsmasq(), undefined, "nobody needs one yet");
  const web = await host.call<Shown>("POST", "", { name: "web", image });
  const address = (log: string) => log.match(/has the address (\S+?)\r?$/m)?.[1];
  assert.equal(address(await host.runs("web")), `${web.network.ip}/24`);
  assert.deepEqual((await report(web.network.ip)).hostname, "web");
  const { stdout } = await host.call<{ stdout: string }>("POST", "/web/exec", { command: ["ip", "route"] });
  assert.match(stdout, new RegExp(`^default via ${GATEWAY} `, "m"));
  assert.match(await run("ip", ["neigh", "show", web.network.ip, "dev", BRIDGE]), /PERMANENT/);

  // A copy of one that runs is told by its agent, and asks itself when it boots.
  const copy = await host.call<Shown>("POST", "/web/fork", {
    name: "copy",
    from_running: true,
    target_state: "Running",
  });
  assert.notEqual(copy.network.ip, web.network.ip);
  assert.equal((await report(copy.network.ip)).hostname, "copy");

  // One that dies is followed by another, and no host leaves one behind.
  const first = host.dnsmasq()!;
  assert.ok(isAlive(first));
  assert.match(readFileSync(`/proc/${first.pid}/status`, "latin1"), /^Uid:\t65534\t65534\t65534\t65534$/m);
  signalProcess(first.pid, "SIGKILL");
  let second = first;
  await until("there is another one", () => (second = host.dnsmasq() ?? first).pid !== first.pid && isAlive(second));
  await host.kill();
  await until("it died with its host", () => !isAlive(second));
  await host.start();
  const third = host.dnsmasq()!;
  assert.ok(third.pid !== second.pid && isAlive(third));
  assert.equal((await report(web.network.ip)).requests, 2);

  await host.call("POST", "/copy/stop");
  await host.call("POST", "/copy/start", {});
  assert.equal(address(await host.runs("copy")), `${copy.network.ip}/24`);
  assert.deepEqual((await report(copy.network.ip)).hostname, "copy");

  assert.ok(isAlive(third));
  await host.end();
  assert.ok(!isAlive(third));
  assert.equal(host.dnsmasq(), undefined);
  await host.start();
  assert.ok(isAlive(host.dnsmasq()!));
  for (const name of ["web", "copy"]) await host.call("DELETE", `/${name}`);
  assert.equal(host.dnsmasq(), undefined, "nobody needs one any more");
});
