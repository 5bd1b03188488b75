/**
 * The plugin `network`: one bridge with one subnet, an address for each instance, a namespace and a veth for those that
 * run, and NAT to the world. Where it cannot work it says why, once, and instances run on the host's network.
 */
import * as v from "valibot";
import { definePlugin, type Network } from "../../main.ts";
import { CommandError } from "../shared/run.ts";
import { Addresses } from "./addresses.ts";
import { bringUp, purge, unsupported } from "./bridge.ts";
import { oneLine } from "./ip.ts";
import { attach, detach, deviceOf, namespaceOf, type Place } from "./ports.ts";
import { macOf, parseSubnet, type Subnet } from "./subnet.ts";

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
        await purge(placeOf(options), host.dataDir);
      },
    },
  },
  async setup(host, options) {
    const place = placeOf(options);
    const addresses = new Addresses(host.use("store"), place.subnet);
    const warn = (reason: string) => host.log.warn("Some devices could not be put right: {reason}", { reason });
    const plan = { owner: host.dataDir, rows: addresses.all(), warn };
    const reason = unsupported() ?? await refusal(() => bringUp(place, plan));
    if (reason) host.log.warn("The network is off, instances run on the host's own: {reason}", { reason });
    host.provide("network", networkOf(place, addresses, reason));
  },
});

function placeOf({ bridge, subnet }: v.InferOutput<typeof Options>): Place {
  return { bridge, subnet: parseSubnet(subnet) as Subnet }; // the schema has checked it
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
  const { bridge, subnet } = place;
  const refuseWhenOff = (what: string) => {
    if (reason) throw new Error(`Cannot ${what}: the network is off: ${reason}`);
  };
  return {
    enabled: reason === null,
    reason,
    bridge,
    subnet: subnet.cidr,
    gateway: subnet.gateway,
    allocate(id) {
      refuseWhenOff(`allocate an address for instance "${id}"`);
      const ip = addresses.allocate(id);
      return { ip, mac: macOf(ip) };
    },
    release: (id) => addresses.release(id),
    async attach(instance) {
      const { ip } = instance.network;
      refuseWhenOff(`attach instance "${instance.name}"`);
      if (ip === null) throw new TypeError(`Cannot attach instance "${instance.name}": it has no address`);
      await attach(place, instance, ip);
      return { namespace: namespaceOf(place, instance.id), host_device: deviceOf(ip) };
    },
    async detach({ id, network }) {
      // What is left behind while the network is off is removed at the next start at which it is on.
      if (reason === null) await detach(place, id, network.ip);
    },
  };
}
