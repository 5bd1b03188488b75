import assert from "node:assert/strict";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";
import { getLogger } from "@logtape/logtape";
import type { Network } from "../../main.ts";
import { Dhcp } from "../../plugins/qemu/dhcp.ts";
import { dnsmasqArguments, nameservers } from "../../plugins/qemu/dnsmasq.ts";
import { QemuDriver } from "../../plugins/qemu/driver.ts";
import { Fleet } from "../../plugins/qemu/fleet.ts";
import { capturedLogs, cleanup, lacking, temporaryFolder, until } from "../helpers.ts";
import { inOwnNetwork, lackingNetwork } from "../isolated.ts";
import { QemuFixture } from "./fixture.ts";
import { demoImage, skipGuest, skipQemu } from "./guest.ts";
import { idleImage } from "./idle.ts";

const skip = skipGuest || lacking(lackingNetwork("setpriv", "qemu-img", "dnsmasq"));

test("machines get their addresses by DHCP over hosts that come and go", { skip, timeout: 900_000 }, async () => {
  const env = { DORMOUSE_TEST_IMAGE: await demoImage() };
  await inOwnNetwork(join(import.meta.dirname!, "dhcp-host.ts"), { timeout: 840_000, env });
});

test(
  "validate() refuses an image that asks for its address where nobody could tell it",
  { skip: skipQemu },
  async (t) => {
    const image = idleImage(t, { dhcp: true });
    const fixture = new QemuFixture(t, "qemu-microvm", image);
    fixture.open();
    const fleet = new Fleet({ ...fixture.fleet!.context, missing: (programs) => programs[0] });
    cleanup(t).use(fleet);
    const driver = new QemuDriver("qemu-microvm", fleet);
    const network = { enabled: true, ip: null, mac: null, ip6: null };
    const code = "invalid_request";
    const asking = driver.validate(fixture.instance(undefined, { network }));
    await assert.rejects(asking, {
      code,
      message: /asks for its address by DHCP, and program "dnsmasq" is not in PATH/,
    });
  },
);

test("serve() says why nobody answers, or tries on for one that can wait", { skip }, async (t) => {
  const logs = capturedLogs(t);
  const fixture = new QemuFixture(t, "qemu-microvm", "/none");
  const network = { enabled: true, bridge: "dmqemunone", subnet: "10.132.0.0/24", gateway: "10.132.0.1" } as Network;
  const dhcp = new Dhcp({ folder: fixture.dataDir, network, owner: null, log: getLogger(["dormouse", "qemu"]) });
  cleanup(t).use(dhcp);
  const ours = { enabled: true, ip: "10.132.0.2", mac: "02:00:00:00:00:02", ip6: null };
  const instance = fixture.instance(undefined, { network: ours });
  await assert.rejects(dhcp.serve(instance), /dnsmasq does not run: .*unknown interface dmqemunone/);
  assert.deepEqual(logs.filter((line) => line.startsWith("warning")), []);
  await dhcp.serve({ ...instance, name: "5m" }, { patient: true });
  await until("it was tried again", () => logs.filter((line) => /trying again: .*dmqemunone/.test(line)).length >= 2);
  assert.equal(readFileSync(join(fixture.dataDir, "dhcp.hosts"), "utf8"), "02:00:00:00:00:02,10.132.0.2,infinite\n");
});

test("dnsmasqArguments() are about one bridge, and nameservers() what machines can reach", (t) => {
  const [owner, log, hosts] = [null, getLogger("test"), "/hosts"];
  const args = dnsmasqArguments({ bridge: "dm0", subnet: "10.88.4.0/22", gateway: "10.88.4.1", hosts, owner, log });
  for (
    const arg of [
      "--interface=dm0",
      "--port=0",
      "--dhcp-range=10.88.4.0,static,255.255.252.0,infinite",
      "--dhcp-lease-max=1024",
      "--dhcp-option=option:router,10.88.4.1",
    ]
  ) assert.ok(args.includes(arg), arg);
  const files = ["stub", "real", "none"].map((name) => join(temporaryFolder(t), name));
  writeFileSync(files[0], "# ours\nnameserver 127.0.0.53\nnameserver ::1\n");
  writeFileSync(files[1], "nameserver 192.0.2.1\nnameserver 192.0.2.2 \nsearch example.org\n");
  assert.deepEqual(nameservers(files), ["192.0.2.1", "192.0.2.2"]);
  assert.deepEqual(nameservers([files[0], files[2]]), []);
});
