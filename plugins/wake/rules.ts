import { existsSync } from "node:fs";

/** Where a published port leads: the instance's addresses and its port. */
export interface Target {
  readonly ip: string;
  readonly ip6: string | null;
  readonly port: number;
}

export interface Place {
  readonly bridge: string;
  /** Addresses that are listened on; `0.0.0.0` stands for all of IPv4, `::` for all of both. */
  readonly bind: readonly string[];
}

type Family = "ip" | "ip6";
/** A kernel without IPv6 has no such tables. */
const FAMILIES: readonly Family[] = existsSync("/proc/net/if_inet6") ? ["ip", "ip6"] : ["ip"];
const LOOPBACK = { ip: "127.0.0.0/8", ip6: "::1" };
const ADDRESS = { ip: "ipv4_addr", ip6: "ipv6_addr" };

const tableOf = (bridge: string) => `dormouse_wake_${bridge}`;

/** Both tables made anew, with these ports: whatever they were before, in one transaction. */
export function rebuilt(place: Place, ports: ReadonlyMap<number, Target>): string {
  return FAMILIES.map((family) => emptied(family, place.bridge) + table(family, place, ports)).join("");
}

/** Both tables removed, whether they are there or not. */
export function removed(bridge: string): string {
  return FAMILIES.map((family) => emptied(family, bridge)).join("");
}

/** What makes `after` of `before`; empty where they are the same. */
export function changed(
  bridge: string,
  before: ReadonlyMap<number, Target>,
  after: ReadonlyMap<number, Target>,
): string {
  const lines: string[] = [];
  for (const family of FAMILIES) {
    const [old, wanted] = [elements(family, before), elements(family, after)];
    const map = `element ${family} ${tableOf(bridge)} wake`;
    const gone = [...old].filter(([port, to]) => wanted.get(port) !== to).map(([port]) => String(port));
    const come = [...wanted].filter(([port, to]) => old.get(port) !== to).map(([port, to]) => `${port} : ${to}`);
    if (gone.length > 0) lines.push(`delete ${map} { ${gone.join(", ")} }\n`);
    if (come.length > 0) lines.push(`add ${map} { ${come.join(", ")} }\n`);
  }
  return lines.join("");
}

function elements(family: Family, ports: ReadonlyMap<number, Target>): Map<number, string> {
  const found = new Map<number, string>();
  for (const [port, target] of ports) {
    const address = target[family];
    if (address !== null) found.set(port, `${address} . ${target.port}`);
  }
  return found;
}

function emptied(family: Family, bridge: string): string {
  return `add table ${family} ${tableOf(bridge)}\ndelete table ${family} ${tableOf(bridge)}\n`;
}

// The guard keeps what the instances send away from the host's 127.0.0.1, which route_localnet would let in, and the
// masquerade brings the answers to it back through the host; every other client is seen by the instance as it is.
// What comes from the bridge itself stays with the listener: with br_netfilter on, as Docker has it, the bridge would
// pass a packet that was rewritten from port to port, which the isolation of the ports forbids. So do connections to
// ::1, for there is no route_localnet for IPv6.
function table(family: Family, place: Place, ports: ReadonlyMap<number, Target>): string {
  const { bridge, bind } = place;
  const all = bind.includes("::") || (family === "ip" && bind.includes("0.0.0.0"));
  const own = bind.filter((address) => address.includes(":") === (family === "ip6") && address !== LOOPBACK.ip6);
  const match = all ? "fib daddr type local" : `${family} daddr { ${own.join(", ")} }`;
  const lead = all || own.length > 0 ? `${match} dnat ${family} to tcp dport map @wake` : "";
  const list = [...elements(family, ports)].map(([port, to]) => `${port} : ${to}`);
  return `table ${family} ${tableOf(bridge)} {
  map wake {
    type inet_service : ${ADDRESS[family]} . inet_service
    ${list.length > 0 ? `elements = { ${list.join(", ")} }` : ""}
  }
  chain guard {
    type filter hook prerouting priority raw; policy accept;
    iifname "${bridge}" ${family} daddr ${LOOPBACK[family]} drop
  }
  chain pre {
    type nat hook prerouting priority dstnat; policy accept;
    ${lead && `iifname != "${bridge}" ${lead}`}
  }
  chain out {
    type nat hook output priority -100; policy accept;
    ${family === "ip6" && lead ? `ip6 daddr != ::1 ${lead}` : lead}
  }
  chain post {
    type nat hook postrouting priority srcnat; policy accept;
    ${family === "ip" ? `oifname "${bridge}" ct status dnat ip saddr 127.0.0.0/8 masquerade` : ""}
  }
}
`;
}
