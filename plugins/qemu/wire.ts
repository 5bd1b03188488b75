import process from "node:process";
import type { Instance, Network } from "../../main.ts";
import type { GuestNetwork } from "./machine.ts";
import type { Owner } from "./records.ts";

/** Makes the cable of a machine, whose host's end its QEMU may open; null where it has none. */
export async function wire(
  instance: Instance,
  network: Network | undefined,
  owner: Owner | null,
): Promise<GuestNetwork | null> {
  const { ip, mac, ip6, enabled } = instance.network;
  if (!enabled || !network?.enabled || ip === null || mac === null) return null;
  const device = await network.attachTap(instance, owner?.uid ?? process.getuid!());
  const prefix = network.subnet.split("/")[1];
  return {
    device,
    mac,
    address: `${ip}/${prefix}`,
    gateway: network.gateway,
    // The address alone: machines of the subnet reach each other through the host, and nobody else answers for them.
    address6: ip6 && `${ip6}/128`,
    gateway6: ip6 && network.gateway6,
  };
}
