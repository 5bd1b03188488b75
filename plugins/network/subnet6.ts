import { existsSync, readFileSync } from "node:fs";
import ipaddr from "ipaddr.js";
import type { Subnet } from "./subnet.ts";

/** An IPv6 subnet. An instance has the address in it whose offset is that of its IPv4 address in the other subnet. */
export interface Subnet6 {
  /** As `fdd0:10:a58::/64`, in the kernel's way of writing. */
  readonly cidr: string;
  readonly prefix: number;
  readonly gateway: string;
  ip(offset: number): string;
}

/** The subnet of a CIDR, or what is wrong with it. */
export function parseSubnet6(cidr: string): Subnet6 | string {
  if (!ipaddr.IPv6.isValidCIDR(cidr) || /[%.]/.test(cidr)) return 'expected an IPv6 subnet such as "fdd0:10:a58::/64"';
  const [address, prefix] = ipaddr.IPv6.parseCIDR(cidr);
  // The largest IPv4 subnet has a prefix of /8, and its 24 bits of offsets have to fit.
  if (prefix < 16 || prefix > 104) return "expected a prefix from /16 to /104";
  const network = ipaddr.IPv6.networkAddressFromCIDR(cidr);
  if (network.toString() !== address.toString()) return `expected the subnet's first address, ${network}/${prefix}`;
  if (["loopback", "linkLocal", "multicast", "unspecified", "ipv4Mapped"].includes(network.range())) {
    return `expected a subnet that hosts can have, not one of the ${network.range()} range`;
  }
  const base = network.toByteArray();
  const ip = (offset: number) => {
    const low = [16, 8, 0].map((shift) => (offset >>> shift) & 255);
    return new ipaddr.IPv6([...base.slice(0, 13), ...low]).toString();
  };
  return { cidr: `${network}/${prefix}`, prefix, gateway: ip(1), ip };
}

/**
 * The subnet of an IPv4 subnet for which none is named: `fdd0`, its prefix and its first address make a /64 of the
 * local addresses of RFC 4193, so 10.88.0.0/16 has fdd0:10:a58::/64. Programs prefer IPv4 from such an address to the
 * world (RFC 6724), and so are not held up on a machine that has IPv6 but no way out.
 */
export function localSubnet6({ cidr, prefix }: Subnet): Subnet6 {
  const [address] = ipaddr.IPv4.parseCIDR(cidr);
  const bytes = [0xfd, 0xd0, 0, prefix, ...address.toByteArray(), 0, 0, 0, 0, 0, 0, 0, 0];
  return parseSubnet6(`${new ipaddr.IPv6(bytes)}/64`) as Subnet6;
}

/** Why this machine's network has no IPv6, or null where it has. */
export function lacking6(): string | null {
  const folder = "/proc/sys/net/ipv6/conf";
  if (!existsSync(`${folder}/all`)) return "the kernel has none";
  const disabled = ["all", "default"].find((name) =>
    readFileSync(`${folder}/${name}/disable_ipv6`, "utf8").trim() === "1"
  );
  return disabled === undefined ? null : `net.ipv6.conf.${disabled}.disable_ipv6 is 1`;
}
