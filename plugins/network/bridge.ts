import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { DormouseError } from "../../main.ts";
import { readIfThere } from "../shared/files.ts";
import { CommandError, run } from "../shared/run.ts";
import { applyRules, removeRules } from "./firewall.ts";
import { devices, hasPlugged, ip, ipEach, type Link, linkOf, namespaces, oneLine, type Route, routes } from "./ip.ts";
import { addressOfDevice, deviceOf, namespaceOf, type Place, portLines } from "./ports.ts";
import { macOf, overlap } from "./subnet.ts";
import { lacking6 } from "./subnet6.ts";
import { forward6, sysctl } from "./sysctl.ts";

const MARK = "dormouse ";

export interface BringUpOptions {
  /** The data_dir, with which the bridge is marked. */
  owner: string;
  /** Every address in use, by instance. */
  rows: Map<string, string>;
  /** Told of what went wrong with single instances. */
  warn(reason: string): void;
}

/**
 * Brings the machine to what the rows say: no namespace or veth without a row, the rules, and the bridge with the ports
 * of the instances that still run. It may be called at any time; it cuts no instance that has a row.
 *
 * @throws {DormouseError} `subnet_overlap`, `bridge_in_use`
 * @throws {CommandError} where the kernel refuses
 */
export async function bringUp(place: Place, { owner, rows, warn }: BringUpOptions): Promise<void> {
  const link = await ownLink(place, owner);
  await refuseOverlap(place);
  await attempt(strayLines(place, rows), warn);
  const probe = namespaceOf(place, "probe");
  // Whether namespaces can be made here is known before anything else is. The probe also makes the mount that holds
  // them, over which the first two `ip netns add` would race.
  await ip([`netns add ${probe}`, `netns delete ${probe}`]);
  try {
    await make(place, owner, link);
  } catch (error) {
    // What was there before may carry instances that run; what was not is taken away again.
    if (!link && devices().has(place.bridge)) await ip([`link delete dev ${place.bridge}`]);
    throw error;
  }
  // Instances can run on while somebody removes the bridge under them.
  const present = link ? new Set() : devices();
  const ports = [...rows.values()].filter((address) => present.has(deviceOf(address)));
  await attempt(ports.flatMap((address) => portLines(place, address)), warn);
}

// One device in a bad way is no reason to turn the network off for all.
async function attempt(lines: string[], warn: (reason: string) => void): Promise<void> {
  try {
    await ipEach(lines);
  } catch (error) {
    if (!(error instanceof CommandError)) throw error;
    warn(oneLine(error));
  }
}

async function make({ bridge, subnet, subnet6 }: Place, owner: string, link: Link | null): Promise<void> {
  // Without an address of its own, a bridge takes that of its ports, and changes it as they come and go.
  if (!link) await ip([`link add name ${bridge} address ${macOf(subnet.gateway)} type bridge`]);
  if (link?.ifalias !== MARK + owner) await run("ip", ["link", "set", "dev", bridge, "alias", MARK + owner]);
  const address = `${subnet.gateway}/${subnet.prefix}`;
  await ip([
    ...addressesOf(link, "inet").filter((other) => other !== address).map((other) => `addr del ${other} dev ${bridge}`),
    `addr replace ${address} dev ${bridge}`,
    `link set dev ${bridge} up`,
  ]);
  // The host answers ARP for the instances to each other (RFC 3069), at once, and routes between them.
  sysctl(`ipv4/conf/${bridge}/proxy_arp_pvlan`, "1");
  sysctl(`ipv4/neigh/${bridge}/proxy_delay`, "0");
  sysctl("ipv4/ip_forward", "1");
  if (lacking6() === null) await make6(bridge, subnet6, link);
  await applyRules(bridge, subnet.cidr, subnet6?.cidr ?? null);
}

async function make6(bridge: string, subnet6: Place["subnet6"], link: Link | null): Promise<void> {
  const address = subnet6 && `${subnet6.gateway}/${subnet6.prefix}`;
  // To turn IPv6 off takes the addresses from the bridge, and the neighbours, which are as old as they are.
  if (addressesOf(link, "inet6").some((other) => other !== address)) sysctl(`ipv6/conf/${bridge}/disable_ipv6`, "1");
  sysctl(`ipv6/conf/${bridge}/disable_ipv6`, address ? "0" : "1");
  if (!address) return;
  sysctl(`ipv6/conf/${bridge}/accept_ra`, "0"); // an instance is nobody's router
  await ip([`addr replace ${address} dev ${bridge} nodad`]);
  forward6();
}

/**
 * Removes the bridge, its namespaces, veths and rules, and tells which of them there were. Instances that still run lose
 * their network.
 *
 * @throws {DormouseError} `bridge_in_use`
 * @throws {CommandError}
 */
export async function purge(place: Place, owner: string): Promise<string[]> {
  const link = await ownLink(place, owner);
  const lines = [...strayLines(place, new Map()), ...(link ? [`link delete dev ${place.bridge}`] : [])];
  await ipEach(lines);
  await removeRules(place.bridge);
  return lines.map((line) => line.replace("link delete dev", "link").replace("netns delete", "namespace"));
}

/** What it lacks to manage networks at all, or null. */
export function unsupported(): string | null {
  if (process.platform !== "linux") return `it needs Linux, and this is ${process.platform}`;
  const effective = BigInt(`0x${/^CapEff:\s*([0-9a-f]+)/m.exec(readFileSync("/proc/self/status", "utf8"))?.[1] ?? 0}`);
  const [CAP_NET_ADMIN, CAP_SYS_ADMIN] = [1n << 12n, 1n << 21n];
  const lacking = !(effective & CAP_NET_ADMIN) || !(effective & CAP_SYS_ADMIN);
  return lacking ? "it needs root (CAP_NET_ADMIN and CAP_SYS_ADMIN)" : null;
}

/** The bridge, if it is there and ours to change. */
async function ownLink({ bridge, subnet }: Place, owner: string): Promise<Link | null> {
  if (!devices().has(bridge)) return null;
  const link = await linkOf(bridge);
  const refuse = (holder: string) => {
    const message = `Cannot use bridge "${bridge}": it belongs to ${holder}; name another bridge and subnet`;
    return new DormouseError("bridge_in_use", message);
  };
  if (link.linkinfo?.info_kind !== "bridge") throw refuse("something else, and is no bridge");
  if (!link.ifalias?.startsWith(MARK)) {
    // It is made with an address that tells it is ours, and marked a moment later: a host can die between the two.
    if (link.address !== macOf(subnet.gateway)) throw refuse("something else");
    return link;
  }
  const other = link.ifalias.slice(MARK.length);
  if (other !== owner && await inUse(bridge, other)) throw refuse(`the host with data_dir "${other}"`);
  return link;
}

// A bridge whose host is not up, and has left no instance on it, goes to whoever comes next; so does one whose data_dir
// was moved or deleted.
async function inUse(bridge: string, dataDir: string): Promise<boolean> {
  if (!existsSync(join(dataDir, "dormouse.db"))) return false;
  const pid = readIfThere(join(dataDir, "dormouse.pid"))?.trim();
  const up = Boolean(pid) && existsSync(`/proc/${pid}`);
  return up || namespaces().some((name) => name.startsWith(`${bridge}-`)) || await hasPlugged(bridge);
}

function addressesOf(link: Link | null, wanted: "inet" | "inet6"): string[] {
  return (link?.addr_info ?? []).filter(({ family, scope }) => family === wanted && scope !== "link")
    .map(({ local, prefixlen }) => `${local}/${prefixlen}`);
}

async function refuseOverlap({ bridge, subnet, subnet6 }: Place): Promise<void> {
  refuseRoutes(bridge, subnet.cidr, await routes("-4"));
  if (subnet6) refuseRoutes(bridge, subnet6.cidr, await routes("-6"));
}

function refuseRoutes(bridge: string, cidr: string, routes: Route[]): void {
  // A VPN that takes all traffic does so with two halves of the internet: they are a default route in disguise.
  const everything = ["default", "0.0.0.0/0", "0.0.0.0/1", "128.0.0.0/1", "::/0", "::/1", "8000::/1", "2000::/3"];
  // Nobody has what such a route takes: routers refuse all local addresses (RFC 7084) but those they have a route to.
  const refusing = ["unreachable", "prohibit", "blackhole", "throw"];
  const route = routes.find(({ dst, dev, type = "" }) =>
    dev !== bridge && !everything.includes(dst) && !refusing.includes(type) && overlap(dst, cidr)
  );
  if (!route) return;
  const { dst, dev, gateway } = route;
  const through = [gateway && `via ${gateway}`, dev && `dev ${dev}`].filter(Boolean).join(" ");
  const message = `Cannot use subnet "${cidr}": it overlaps the route ${dst} ${through}`.trim();
  throw new DormouseError("subnet_overlap", message);
}

function strayLines(place: Place, rows: Map<string, string>): string[] {
  const kept = new Set([...rows.keys()].map((id) => namespaceOf(place, id)));
  const inUse = new Set([...rows.values()].map(deviceOf));
  const links = [...devices()].filter((name) => addressOfDevice(place, name) && !inUse.has(name));
  const strays = namespaces().filter((name) => name.startsWith(namespaceOf(place, "")) && !kept.has(name));
  return [...links.map((name) => `link delete dev ${name}`), ...strays.map((name) => `netns delete ${name}`)];
}
