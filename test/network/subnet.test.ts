import assert from "node:assert/strict";
import { test } from "node:test";
import { fromHex, hexOf, macOf, overlap, parseSubnet, type Subnet } from "../../plugins/network/subnet.ts";

test("parseSubnet() tells the gateway and what is between it and the broadcast address", () => {
  const subnets = [
    ["10.88.0.0/16", "10.88.0.1", "10.88.0.2", "10.88.255.254"],
    ["192.168.7.8/29", "192.168.7.9", "192.168.7.10", "192.168.7.14"],
    ["10.0.0.0/8", "10.0.0.1", "10.0.0.2", "10.255.255.254"],
    ["203.0.112.0/20", "203.0.112.1", "203.0.112.2", "203.0.127.254"],
  ];
  for (const [cidr, gateway, first, last] of subnets) {
    const subnet = parseSubnet(cidr) as Subnet;
    assert.deepEqual(
      [subnet.cidr, subnet.gateway, subnet.ip(subnet.first), subnet.ip(subnet.last)],
      [cidr, gateway, first, last],
    );
    assert.ok(subnet.contains(first) && !subnet.contains(subnet.ip(subnet.last + 2)), cidr);
  }
});

test("parseSubnet() tells what is wrong when it cannot be used", () => {
  const wrong: [string, RegExp][] = [
    ["", /IPv4 subnet such as/],
    ["10.88.0.0", /IPv4 subnet such as/],
    ["10.88/16", /IPv4 subnet such as/],
    ["10.88.0.0/33", /IPv4 subnet such as/],
    ["fd00::/64", /IPv4 subnet such as/],
    ["10.0.0.0/7", /from \/8 to \/29/],
    ["10.88.0.0/30", /from \/8 to \/29/],
    ["10.88.0.1/16", /first address, 10\.88\.0\.0\/16/],
    ["127.0.0.0/8", /loopback/],
    ["224.0.0.0/8", /multicast/],
    ["169.254.0.0/16", /linkLocal/],
  ];
  for (const [cidr, expected] of wrong) assert.match(String(parseSubnet(cidr)), expected, cidr);
});

test("macOf() and hexOf() are as unique as the address", () => {
  assert.equal(macOf("10.88.0.2"), "02:d0:0a:58:00:02");
  for (const ip of ["10.88.0.2", "0.0.0.1", "255.255.255.254", "192.168.200.128"]) assert.equal(fromHex(hexOf(ip)), ip);
});

test("overlap() is true when an address is in both", () => {
  const pairs: [string, string, boolean][] = [
    ["10.88.0.0/16", "10.88.4.0/24", true],
    ["10.88.4.0/24", "10.88.0.0/16", true],
    ["10.88.4.7", "10.88.0.0/16", true],
    ["10.0.0.0/8", "10.88.0.0/16", true],
    ["10.89.0.0/16", "10.88.0.0/16", false],
    ["192.0.2.2", "10.88.0.0/16", false],
  ];
  for (const [a, b, expected] of pairs) assert.equal(overlap(a, b), expected, `${a} and ${b}`);
});
