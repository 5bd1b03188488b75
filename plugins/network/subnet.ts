import ipaddr from "ipaddr.js";

/** An IPv4 subnet; what it hands out is told by the offset from its first address. */
export interface Subnet {
  /** As `10.88.0.0/16`. */
  readonly cidr: string;
  readonly prefix: number;
  readonly gateway: string;
  /** Offsets that instances may have, both included: after the gateway, before the broadcast address. */
  readonly first: number;
  readonly last: number;
  ip(offset: number): string;
  /** The reverse of `ip`. */
  offset(ip: string): number;
  contains(ip: string): boolean;
}

/** The subnet of a CIDR, or what is wrong with it. */
export function parseSubnet(cidr: string): Subnet | string {
  if (!ipaddr.IPv4.isValidCIDRFourPartDecimal(cidr)) return 'expected an IPv4 subnet such as "10.88.0.0/16"';
  const [address, prefix] = ipaddr.IPv4.parseCIDR(cidr);
  if (prefix < 8 || prefix > 29) return "expected a prefix from /8 to /29";
  const network = ipaddr.IPv4.networkAddressFromCIDR(cidr);
  if (network.toString() !== address.toString()) return `expected the subnet's first address, ${network}/${prefix}`;
  if (["loopback", "linkLocal", "multicast", "unspecified", "broadcast"].includes(network.range())) {
    return `expected a subnet that hosts can have, not one of the ${network.range()} range`;
  }
  const base = numberOf(network);
  const ip = (offset: number) => addressOf(base + offset);
  const last = 2 ** (32 - prefix) - 2;
  return {
    cidr,
    prefix,
    gateway: ip(1),
    first: 2,
    last,
    ip,
    offset: (ip) => numberOf(ipaddr.IPv4.parse(ip)) - base,
    contains: (ip) => ipaddr.IPv4.parse(ip).match(network, prefix),
  };
}

/** A locally administered MAC address that is as unique as the address it is made from. */
export function macOf(ip: string): string {
  return ["02", "d0", ...hexOf(ip).match(/../g)!].join(":");
}

/** `10.88.0.2` as `0a580002`. */
export function hexOf(ip: string): string {
  return numberOf(ipaddr.IPv4.parse(ip)).toString(16).padStart(8, "0");
}

/** The reverse of {@linkcode hexOf}. */
export function fromHex(hex: string): string {
  return addressOf(Number.parseInt(hex, 16));
}

/** Whether two CIDRs, or addresses without a prefix, share an address. Those of different families never do. */
export function overlap(a: string, b: string): boolean {
  const [[first, size], [second, other]] = [a, b].map(range);
  return first.kind() === second.kind() && first.match([second, Math.min(size, other)]);
}

function range(text: string): [ipaddr.IPv4 | ipaddr.IPv6, number] {
  if (text.includes("/")) return ipaddr.parseCIDR(text);
  const address = ipaddr.parse(text);
  return [address, address.toByteArray().length * 8];
}

function numberOf(address: ipaddr.IPv4): number {
  return address.toByteArray().reduce((sum, byte) => sum * 256 + byte, 0);
}

function addressOf(number: number): string {
  return new ipaddr.IPv4([24, 16, 8, 0].map((shift) => (number >>> shift) & 255)).toString();
}
