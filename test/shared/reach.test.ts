import assert from "node:assert/strict";
import { test } from "node:test";
import type { Driver, Hypervisor, Instance, Network } from "../../main.ts";
import { Reach } from "../../plugins/shared/reach.ts";

const DRIVERS = [{ name: "sharing", features: new Set(["host-network"]) }, { name: "apart", features: new Set() }];
const HYPERVISOR = { drivers: () => DRIVERS as unknown as Driver[] } as Hypervisor;
const instance = (driver: string, network: Partial<Instance["network"]>) => ({ driver, network } as Instance);

test("Reach tells this machine's own address for nobody who does not share its network", () => {
  const [own, none] = [{ enabled: true, ip: "10.0.0.2" }, { enabled: false, ip: null }];
  const on = new Reach(HYPERVISOR, { enabled: true } as Network);
  const [off, absent] = [new Reach(HYPERVISOR, { enabled: false } as Network), new Reach(HYPERVISOR, undefined)];
  const cases: [Reach, Instance, string | null][] = [
    [on, instance("sharing", own), "10.0.0.2"],
    [on, instance("apart", own), "10.0.0.2"],
    [on, instance("sharing", none), null],
    [off, instance("sharing", none), "127.0.0.1"],
    [off, instance("apart", none), null],
    [absent, instance("sharing", none), "127.0.0.1"],
    [absent, instance("apart", none), null],
  ];
  for (const [reach, of, address] of cases) {
    assert.equal(reach.addressOf(of), address, JSON.stringify(of));
    assert.equal(reach.has(of), address !== null, JSON.stringify(of));
  }
  assert.ok(absent.has(instance("nobody", none)), "that there is no such driver is for others to say");
});
