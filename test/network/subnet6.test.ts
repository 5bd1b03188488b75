import assert from "node:assert/strict";
import { test } from "node:test";
import { overlap, parseSubnet, type Subnet } from "../../plugins/network/subnet.ts";
import { localSubnet6, parseSubnet6, type Subnet6 } from "../../plugins/network/subnet6.ts";

test("localSubnet6() makes a /64 of its own from each IPv4 subnet", () => {
  const subnets = [
    ["10.88.0.0/16", "fdd0:10:a58::/64", "fdd0:10:a58::1"],
    ["10.88.0.0/24", "fdd0:18:a58::/64", "fdd0:18:a58::1"],
    ["192.168.7.8/29", "fdd0:1d:c0a8:708::/64", "fdd0:1d:c0a8:708::1"],
  ];
  for (const [cidr, expected, gateway] of subnets) {
    const made = localSubnet6(parseSubnet(cidr) as Subnet);
    assert.deepEqual([made.cidr, made.gateway], [expected, gateway]);
  }
});

test("ip() has the offset of the IPv4 address", () => {
  const subnet = parseSubnet("10.0.0.0/8") as Subnet;
  const cases = [
    ["fd12:3456::/32", "10.0.0.2", "fd12:3456::2"],
    ["2001:db8:0:1::/64", "10.1.2.3", "2001:db8:0:1::1:203"],
    ["fd00:1:2:3:4:5:600:0/104", "10.255.255.254", "fd00:1:2:3:4:5:6ff:fffe"],
  ];
  for (const [cidr, ip, expected] of cases) {
    const subnet6 = parseSubnet6(cidr) as Subnet6;
    assert.equal(subnet6.ip(subnet.offset(ip)), expected, cidr);
    assert.equal(subnet.ip(subnet.offset(ip)), ip);
  }
  assert.equal((parseSubnet6("FD12:0:0::/48") as Subnet6).cidr, "fd12::/48", "as the kernel writes it");
});

test("parseSubnet6() tells what is wrong when it cannot be used", () => {
  const wrong: [string, RegExp][] = [
    ["fd00::", /IPv6 subnet such as/],
    ["10.88.0.0/16", /IPv6 subnet such as/],
    ["fd00::/129", /IPv6 subnet such as/],
    ["fd00::%eth0/64", /IPv6 subnet such as/],
    ["64:ff9b::10.0.0.0/96", /IPv6 subnet such as/],
    ["fd00::/12", /from \/16 to \/104/],
    ["fd00::/105", /from \/16 to \/104/],
    ["fd00::1/64", /first address, fd00::\/64/],
    ["fe80::/64", /linkLocal/],
    ["ff02::/64", /multicast/],
    ["::/64", /unspecified/],
    ["::ffff:0:0/96", /ipv4Mapped/],
  ];
  for (const [cidr, expected] of wrong) assert.match(String(parseSubnet6(cidr)), expected, cidr);
});

test("overlap() is true when an address is in both, and false across families", () => {
  const pairs: [string, string, boolean][] = [
    ["fdd0:10:a58::/64", "fdd0::/16", true],
    ["fdd0::/16", "fdd0:10:a58::/64", true],
    ["fdd0:10:a58::7", "fdd0:10:a58::/64", true],
    ["fdd0:10:a59::/64", "fdd0:10:a58::/64", false],
    ["::1", "fdd0:10:a58::/64", false],
    ["10.88.0.0/16", "::/1", false],
  ];
  for (const [a, b, expected] of pairs) assert.equal(overlap(a, b), expected, `${a} and ${b}`);
});
