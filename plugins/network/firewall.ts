import { run } from "../shared/run.ts";

const tableOf = (bridge: string) => `dormouse_net_${bridge}`;

/**
 * Puts the bridge's table in place of what it was, in one transaction of the kernel's.
 *
 * The `ct state` rules do two things: that they are there turns connection tracking on in this network namespace, and
 * they let the subnet through. An `accept` ends only our own table: on a machine where another firewall drops what it
 * does not know (Docker sets the FORWARD policy so), a rule for the bridge has to be added there (in DOCKER-USER).
 *
 * @throws {CommandError} where nft is missing or the kernel refuses
 */
export async function applyRules(bridge: string, subnet: string, subnet6: string | null): Promise<void> {
  await run("nft", ["-f", "-"], { input: rules(bridge, subnet, subnet6) });
}

/** @throws {CommandError} */
export async function removeRules(bridge: string): Promise<void> {
  await run("nft", ["-f", "-"], { input: emptied(bridge) });
}

// Adding first makes the deletion succeed whether the table is there or not.
function emptied(bridge: string): string {
  return `add table inet ${tableOf(bridge)}\ndelete table inet ${tableOf(bridge)}\n`;
}

// `guard` runs before connection tracking. What is bound to the host's 127.0.0.1 stays out of reach even where
// route_localnet is set on the bridge, and nothing leaves the bridge under an address from elsewhere; under none at all
// only who asks for one by DHCP. Of link-local addresses IPv6 needs the questions after neighbours and the answers, and no
// more: traffic to and from them is nobody's.
// `output` keeps the host from telling instances to reach each other directly: their ports are isolated.
// The masquerade leaves out `lo`, where the host talks to its own address on the bridge.
function rules(bridge: string, subnet: string, subnet6: string | null): string {
  return `${emptied(bridge)}
table inet ${tableOf(bridge)} {
  chain guard {
    type filter hook prerouting priority raw; policy accept;
    iifname "${bridge}" ip daddr 127.0.0.0/8 drop
    iifname "${bridge}" ip saddr 0.0.0.0 ip daddr 255.255.255.255 udp sport 68 udp dport 67 accept
    iifname "${bridge}" ip saddr != ${subnet} drop
    ${subnet6 ? guard6(bridge, subnet6) : `iifname "${bridge}" meta nfproto ipv6 drop`}
  }
  chain forward {
    type filter hook forward priority filter; policy accept;
    iifname "${bridge}" ct state new,established,related accept
    oifname "${bridge}" ct state new,established,related accept
  }
  chain output {
    type filter hook output priority filter; policy accept;
    oifname "${bridge}" icmp type redirect drop
    oifname "${bridge}" icmpv6 type nd-redirect drop
  }
  chain postrouting {
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr ${subnet} oifname != { "${bridge}", "lo" } masquerade
    ${subnet6 ? `ip6 saddr ${subnet6} oifname != { "${bridge}", "lo" } masquerade` : ""}
  }
}
`;
}

function guard6(bridge: string, subnet6: string): string {
  return `iifname "${bridge}" ip6 daddr ::1 drop
    iifname "${bridge}" ip6 saddr fe80::/10 icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept
    iifname "${bridge}" ip6 saddr != ${subnet6} drop`;
}
