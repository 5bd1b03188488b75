import ipaddr from "ipaddr.js";
import type { Flow } from "../../main.ts";
import type { AutoStandby } from "./policy.ts";

/** Whether a flow is one that could keep the instance awake. */
export type Filter = (flow: Flow) => boolean;

export interface FilterOptions {
  countUdp: boolean;
  /** Whether the host itself opened it, to probe the instance or to see whether it answers yet. */
  probe: Filter;
}

/** What a policy makes visible: neither our own probes nor what it ignores. */
export function filterOf(policy: AutoStandby | undefined, { countUdp, probe }: FilterOptions): Filter {
  const ports = new Set(policy?.ignore_destination_ports);
  const ignored = sources(policy?.ignore_source_cidrs ?? []);
  return (flow) =>
    (flow.protocol === "tcp" || countUdp) &&
    !ports.has(flow.destination_port) &&
    !probe(flow) &&
    !ignored?.(flow.source);
}

function sources(cidrs: readonly string[]): ((address: string) => boolean) | undefined {
  if (cidrs.length === 0) return undefined;
  const [four, six] = [cidrs.filter((cidr) => !cidr.includes(":")), cidrs.filter((cidr) => cidr.includes(":"))];
  const networks4 = four.map((cidr) => ipaddr.IPv4.parseCIDR(cidr));
  const networks6 = six.map((cidr) => ipaddr.IPv6.parseCIDR(cidr));
  return (address) => {
    if (!address.includes(":")) {
      if (networks4.length === 0) return false;
      const parsed = ipaddr.IPv4.parse(address);
      return networks4.some(([network, bits]) => parsed.match(network, bits));
    }
    if (networks6.length === 0) return false;
    const parsed = ipaddr.IPv6.parse(address);
    return networks6.some(([network, bits]) => parsed.match(network, bits));
  };
}
