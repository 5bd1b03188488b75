import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { DormouseError } from "../../main.ts";
import { filterOf } from "../../plugins/conntrack-standby/filter.ts";
import { idleTimeoutOf, normalise } from "../../plugins/conntrack-standby/policy.ts";
import { flow, ORIGIN, world } from "./world.ts";

const ON = { enabled: true, idle_timeout: "5m" };

test("normalise() keeps one spelling of a policy", () => {
  const policy = normalise({
    ...ON,
    ignore_source_cidrs: [" 10.1.2.3/8", "", "10.0.0.0/8", "2001:DB8::1/32", "192.168.1.7/32", "0.0.0.0/0"],
    ignore_destination_ports: [9100, 22, 9100],
  });
  assert.deepEqual(policy, {
    enabled: true,
    idle_timeout: "5m0s",
    ignore_source_cidrs: ["0.0.0.0/0", "10.0.0.0/8", "192.168.1.7/32", "2001:db8::/32"],
    ignore_destination_ports: [22, 9100],
  });
  assert.deepEqual(normalise(policy), policy);
  assert.deepEqual(normalise({ enabled: false, idle_timeout: "nonsense" }), { enabled: false });
  assert.equal(idleTimeoutOf(policy), 300_000);
  assert.equal(idleTimeoutOf({ enabled: false }), undefined);
});

test("normalise() refuses what cannot be meant", () => {
  const cidrs = [
    "10.0.0.0",
    "10.0.0/8",
    "10.0.0.0/33",
    "10.0.0.0/-1",
    "0x0a.0.0.0/8",
    "fe80::1%eth0/64",
    "::/129",
    "a/b",
  ];
  const wrong = [
    ...["", "0", "0s", "-1s", "5", "5 m", "forever"].map((idle_timeout) => ({ idle_timeout })),
    { idle_timeout: undefined },
    ...cidrs.map((cidr) => ({ ignore_source_cidrs: [cidr] })),
    ...[0, -1, 65_536, 1.5, NaN].map((port) => ({ ignore_destination_ports: [port] })),
  ];
  for (const change of wrong) {
    assert.throws(
      () => normalise({ ...ON, ...change }),
      (error) => error instanceof DormouseError && error.code === "invalid_auto_standby",
      JSON.stringify(change),
    );
  }
});

test("create() answers with invalid_auto_standby when the field has a wrong shape", async (t) => {
  const { hypervisor } = await world(t);
  const coded = (error: unknown) => error instanceof DormouseError && error.code === "invalid_auto_standby";
  for (
    const auto_standby of [true, "5m", { enabled: "yes" }, { ...ON, idle: 1 }, { ...ON, ignore_source_cidrs: [1] }]
  ) {
    const body = { name: "web", image: "any", auto_standby };
    await assert.rejects(hypervisor.create(body, ORIGIN), coded, JSON.stringify(auto_standby));
  }
  const { policies } = await hypervisor.create({ name: "web", image: "any", auto_standby: ON }, ORIGIN);
  assert.deepEqual(policies.auto_standby, { enabled: true, idle_timeout: "5m0s" });
});

test("filterOf() sees all but UDP, probes, and the ports and sources that the policy ignores", () => {
  const policy = normalise({
    ...ON,
    ignore_source_cidrs: ["10.0.0.0/8", "2001:db8::/32"],
    ignore_destination_ports: [9100],
  });
  const options = { countUdp: false, probe: () => false };
  const sees = filterOf(policy, options);
  assert.ok(sees(flow()));
  assert.ok(sees(flow({ source: "2001:db9::1" })));
  for (const hidden of [{ source: "10.255.0.1" }, { source: "2001:db8:ffff::1" }, { destination_port: 9100 }]) {
    assert.equal(sees(flow(hidden)), false, JSON.stringify(hidden));
  }
  assert.equal(sees(flow({ protocol: "udp", state: "" })), false);
  assert.ok(filterOf(policy, { ...options, countUdp: true })(flow({ protocol: "udp", state: "" })));
  assert.equal(filterOf(policy, { ...options, probe: () => true })(flow()), false);
});

test("filterOf() agrees with arithmetic on every IPv4 network", () => {
  const octet = fc.integer({ min: 0, max: 255 });
  const number = (text: string) => text.split(".").reduce((value, part) => value * 256 + Number(part), 0);
  fc.assert(
    fc.property(
      fc.tuple(octet, octet, octet, octet),
      fc.tuple(octet, octet, octet, octet),
      fc.nat(32),
      (a, b, bits) => {
        const [network, source] = [a.join("."), b.join(".")];
        const policy = normalise({ ...ON, ignore_source_cidrs: [`${network}/${bits}`] });
        const size = 2 ** (32 - bits);
        const inside = Math.floor(number(network) / size) === Math.floor(number(source) / size);
        assert.equal(filterOf(policy, { countUdp: false, probe: () => false })(flow({ source })), !inside);
      },
    ),
  );
});
