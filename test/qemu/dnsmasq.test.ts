import assert from "node:assert/strict";
import { existsSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";
import { getLogger } from "@logtape/logtape";
import type { Network } from "../../main.ts";
import { Dhcp } from "../../plugins/qemu/dhcp.ts";
import { missingProgram } from "../../plugins/shared/programs.ts";
import { cleanup, lacking, temporaryFolder } from "../helpers.ts";
import { QemuFixture } from "./fixture.ts";

const missing = missingProgram(["dnsmasq", "setpriv"]);
const skip = lacking(missing === undefined ? null : `there is no ${missing}`);

// As a loss of power leaves a file that was just renamed.
test("Dhcp.serve() starts dnsmasq whatever is left of the note of the one before", { skip }, async (t) => {
  const folder = temporaryFolder(t);
  const network = { enabled: true, bridge: "dm-no-bridge", subnet: "10.99.0.0/16", gateway: "10.99.0.1" } as Network;
  const dhcp = new Dhcp({ folder, network, owner: null, log: getLogger("dormouse-test") });
  cleanup(t).defer(() => dhcp[Symbol.asyncDispose]());
  const machine = { ip: "10.99.0.2", mac: "02:00:00:00:00:02", ip6: null, enabled: true };
  const instance = new QemuFixture(t, "qemu", "").instance("true", { network: machine });
  for (const text of ["", '{"pid":1']) {
    writeFileSync(join(folder, "dnsmasq.json"), text);
    await assert.rejects(dhcp.serve(instance), /^Error: dnsmasq does not run: .*dm-no-bridge/);
    assert.ok(!existsSync(join(folder, "dnsmasq.json")));
  }
});
