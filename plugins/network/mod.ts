/**
 * The plugin `network`: one bridge with a subnet of IPv4 and one of IPv6, addresses for each instance, a namespace and a veth for those that
 * run, and NAT to the world. Where it cannot work it says why, once, and instances run on the host's network.
 */
import * as v from "valibot";
import { definePlugin, type Network } from "../../main.ts";
import { CommandError } from "../shared/run.ts";
import { Addresses } from "./addresses.ts";
import { bringUp, purge, unsupported } from "./bridge.ts";
import { oneLine } from "./ip.ts";
import { attach, attachTap, detach, deviceOf, ip6Of, namespaceOf, type Place } from "./ports.ts";
import { macOf, parseSubnet, type Subnet } from "./subnet.ts";
import { lacking6, localSubnet6, parseSubnet6, type Subnet6 } from "./subnet6.ts";

const Options = v.object({
  /** The name of the bridge; several hosts on one machine need different ones. */
  bridge: v.optional(
    v.pipe(v.string(), v.regex(/^[a-z][a-z0-9]{0,14}$/, "expected 1 to 15 of a-z and 0-9, a letter first")),
    "dormouse0",
  ),
  /** Instances get their addresses from it, the host has the first one. */
  subnet: v.optional(
    v.pipe(
      v.string(),
      v.check((cidr) => typeof parseSubnet(cidr) === "object", ({ input }) => String(parseSubnet(input))),
    ),
    "10.88.0.0/16",
  ),
  /**
   * The IPv6 subnet, used like the other one; made from that one when absent (fdd0:10:a58::/64 from 10.88.0.0/16), none
   * when empty or false. Instances get a changed one at their next start.
   */
  subnet6: v.optional(
    v.pipe(
      v.union([v.string(), v.literal(false)], 'expected an IPv6 subnet such as "fdd0:10:a58::/64", or false'),
      v.check(
        (cidr) => !cidr || typeof parseSubnet6(cidr) === "object",
        ({ input }) => String(parseSubnet6(String(input))),
      ),
    ),
  ),
});

export default definePlugin({
  name: "network",
  requires: ["store"],
  provides: ["network"],
  options: Options,
  commands: {
    "purge-network": {
      help: "removes the bridge, namespaces, veths and rules of this config, then exits; stop its instances first",
      async run(host, options) {
        const lacking = unsupported();
        if (lacking) throw new Error(`Cannot purge the network: ${lacking}`);
        const removed = await purge(placeOf(options), host.dataDir);
        host.log.info("Removed the rules of {bridge}, and {what}", {
          bridge: options.bridge,
          what: removed.join(", ") || "there was nothing else",
        });
      },
    },
  },
  async setup(host, options) {
    const place = placeOf(options);
    if (wants6(options) && !place.subnet6) {
      host.log.info("Instances have no IPv6: {reason}", { reason: lacking6() });
    }
    const addresses = new Addresses(host.use("store"), place.subnet);
    const warn = (reason: string) => host.log.warn("Some devices could not be put right: {reason}", { reason });
    const plan = { owner: host.dataDir, rows: addresses.all(), warn };
    const reason = unsupported() ?? await refusal(() => bringUp(place, plan));
    if (reason) host.log.warn("The network is off, instances run on the host's own: {reason}", { reason });
    host.provide("network", networkOf(place, addresses, reason));
  },
});

function placeOf(options: v.InferOutput<typeof Options>): Place {
  const subnet = parseSubnet(options.subnet) as Subnet; // the schema has checked both
  const subnet6 = options.subnet6 ? parseSubnet6(options.subnet6) as Subnet6 : localSubnet6(subnet);
  return { bridge: options.bridge, subnet, subnet6: wants6(options) && lacking6() === null ? subnet6 : null };
}

function wants6({ subnet6 }: v.InferOutput<typeof Options>): boolean {
  return subnet6 !== "" && subnet6 !== false;
}

/** What a machine says that cannot do it, as a reason; a config that is wrong is thrown on, and so is a bug. */
async function refusal(work: () => Promise<void>): Promise<string | null> {
  try {
    await work();
    return null;
  } catch (error) {
    if (error instanceof CommandError) return oneLine(error);
    if (error instanceof Error && "syscall" in error) return error.message; // a sysctl in a read-only /proc
    throw error;
  }
}

function networkOf(place: Place, addresses: Addresses, reason: string | null): Network {
  const { bridge, subnet, subnet6 } = place;
  const refuseWhenOff = (what: string) => {
    if (reason) throw new Error(`Cannot ${what}: the network is off: ${reason}`);
  };
  return {
    enabled: reason === null,
    reason,
    bridge,
    subnet: subnet.cidr,
    gateway: subnet.gateway,
    subnet6: subnet6?.cidr ?? null,
    gateway6: subnet6?.gateway ?? null,
    allocate(id) {
      refuseWhenOff(`allocate an address for instance "${id}"`);
      const ip = addresses.allocate(id);
      return { ip, mac: macOf(ip), ip6: ip6Of(place, ip) };
    },
    release: (id) => addresses.release(id),
    async attach(instance) {
      const { ip } = instance.network;
      refuseWhenOff(`attach instance "${instance.name}"`);
      if (ip === null) throw new TypeError(`Cannot attach instance "${instance.name}": it has no address`);
      await attach(place, instance, ip);
      return { namespace: namespaceOf(place, instance.id), host_device: deviceOf(ip) };
    },
    async attachTap(instance, uid) {
      const { ip } = instance.network;
      refuseWhenOff(`attach instance "${instance.name}"`);
      if (ip === null) throw new TypeError(`Cannot attach instance "${instance.name}": it has no address`);
      await attachTap(place, instance, ip, uid);
      return deviceOf(ip);
    },
    async detach({ id, network }) {
      // What is left behind while the network is off is removed at the next start at which it is on.
      if (reason === null) await detach(place, id, network.ip);
    },
  };
}
