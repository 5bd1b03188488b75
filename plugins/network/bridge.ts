import { existsSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { DormouseError } from "../../main.ts";
import { CommandError, run } from "../shared/run.ts";
import { applyRules, removeRules } from "./firewall.ts";
import { devices, ip, ipEach, type Link, linkOf, namespaces, oneLine, routes } from "./ip.ts";
import { addressOfDevice, deviceOf, namespaceOf, type Place, portLines } from "./ports.ts";
import { macOf, overlap } from "./subnet.ts";

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

async function make({ bridge, subnet }: Place, owner: string, link: Link | null): Promise<void> {
  // Without an address of its own, a bridge takes that of its ports, and changes it as they come and go.
  if (!link) await ip([`link add name ${bridge} address ${macOf(subnet.gateway)} type bridge`]);
  if (link?.ifalias !== MARK + owner) await run("ip", ["link", "set", "dev", bridge, "alias", MARK + owner]);
  const address = `${subnet.gateway}/${subnet.prefix}`;
  await ip([
    ...addressesOf(link).filter((other) => other !== address).map((other) => `addr del ${other} dev ${bridge}`),
    `addr replace ${address} dev ${bridge}`,
    `link set dev ${bridge} up`,
  ]);
  // The host answers ARP for the instances to each other (RFC 3069), at once, and routes between them.
  sysctl(`conf/${bridge}/proxy_arp_pvlan`, "1");
  sysctl(`neigh/${bridge}/proxy_delay`, "0");
  sysctl("ip_forward", "1");
  await applyRules(bridge, subnet.cidr);
}

/**
 * Removes the bridge, its namespaces, veths and rules. Instances that still run lose their network.
 *
 * @throws {DormouseError} `bridge_in_use`
 * @throws {CommandError}
 */
export async function purge(place: Place, owner: string): Promise<void> {
  const link = await ownLink(place, owner);
  await ipEach([...strayLines(place, new Map()), ...(link ? [`link delete dev ${place.bridge}`] : [])]);
  await removeRules(place.bridge);
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
  if (other !== owner && inUse(bridge, other)) throw refuse(`the host with data_dir "${other}"`);
  return link;
}

// A bridge whose host is not up, and has left no instance on it, goes to whoever comes next; so does one whose data_dir
// was moved or deleted.
function inUse(bridge: string, dataDir: string): boolean {
  if (!existsSync(join(dataDir, "dormouse.db"))) return false;
  const pidFile = join(dataDir, "dormouse.pid");
  const up = existsSync(pidFile) && existsSync(`/proc/${readFileSync(pidFile, "utf8").trim()}`);
  return up || namespaces().some((name) => name.startsWith(`${bridge}-`));
}

function addressesOf(link: Link | null): string[] {
  return (link?.addr_info ?? []).filter(({ family }) => family === "inet")
    .map(({ local, prefixlen }) => `${local}/${prefixlen}`);
}

async function refuseOverlap({ bridge, subnet }: Place): Promise<void> {
  // A VPN that takes all traffic does so with two halves of the internet: they are a default route in disguise.
  const everything = ["default", "0.0.0.0/0", "0.0.0.0/1", "128.0.0.0/1"];
  const route = (await routes()).find(({ dst, dev }) =>
    dev !== bridge && !everything.includes(dst) && overlap(dst, subnet.cidr)
  );
  if (!route) return;
  const { dst, dev, gateway } = route;
  const through = [gateway && `via ${gateway}`, dev && `dev ${dev}`].filter(Boolean).join(" ");
  const message = `Cannot use subnet "${subnet.cidr}": it overlaps the route ${dst} ${through}`.trim();
  throw new DormouseError("subnet_overlap", message);
}

function strayLines(place: Place, rows: Map<string, string>): string[] {
  const kept = new Set([...rows.keys()].map((id) => namespaceOf(place, id)));
  const inUse = new Set([...rows.values()].map(deviceOf));
  const links = [...devices()].filter((name) => addressOfDevice(place, name) && !inUse.has(name));
  const strays = namespaces().filter((name) => name.startsWith(namespaceOf(place, "")) && !kept.has(name));
  return [...links.map((name) => `link delete dev ${name}`), ...strays.map((name) => `netns delete ${name}`)];
}

function sysctl(path: string, value: string): void {
  const file = `/proc/sys/net/ipv4/${path}`;
  if (readFileSync(file, "utf8").trim() !== value) writeFileSync(file, value);
}
