import { DormouseError, type Instance } from "../../main.ts";
import { CommandError } from "../shared/run.ts";
import { devices, ip, ipEach, namespaceAt } from "./ip.ts";
import { fromHex, hexOf, macOf, type Subnet } from "./subnet.ts";
import type { Subnet6 } from "./subnet6.ts";

/** Where instances are attached: the bridge, which also names what belongs to it. */
export interface Place {
  readonly bridge: string;
  readonly subnet: Subnet;
  /** Null where instances have IPv4 only. */
  readonly subnet6: Subnet6 | null;
}

/** The IPv6 address that goes with an IPv4 address. */
export function ip6Of({ subnet, subnet6 }: Place, ip: string): string | null {
  return subnet6?.ip(subnet.offset(ip)) ?? null;
}

/** The name of an instance's namespace. A bridge's name holds no hyphen, so nobody else's begins like it. */
export function namespaceOf({ bridge }: Place, id: string): string {
  return `${bridge}-${id}`;
}

/** The name of the host's end of an instance's veth: made from the address, for the kernel allows 15 characters. */
export function deviceOf(ip: string): string {
  return `dm-${hexOf(ip)}`;
}

/** The address that a device of ours was named for, if it is one of the subnet's. */
export function addressOfDevice({ subnet }: Place, device: string): string | null {
  const hex = /^dm-([0-9a-f]{8})$/.exec(device)?.[1];
  const address = hex === undefined ? null : fromHex(hex);
  return address !== null && subnet.contains(address) ? address : null;
}

/**
 * What ties a device of an instance to the bridge, a veth or a TAP; repeating it disturbs nothing. Ports are isolated,
 * so that instances reach each other through the host, where conntrack and the wake path see them (a bridge alone would
 * pass their frames beneath both). The permanent neighbour keeps an instance from answering for another one's address
 * and the kernel's limit of learned neighbours out of play.
 */
export function portLines(place: Place, address: string): string[] {
  const { bridge } = place;
  const [device, mac, ip6] = [deviceOf(address), macOf(address), ip6Of(place, address)];
  return [
    `link set dev ${device} master ${bridge} up`,
    `link set dev ${device} type bridge_slave isolated on`,
    `neigh replace ${address} lladdr ${mac} dev ${bridge} nud permanent`,
    ...(ip6 === null ? [] : [`neigh replace ${ip6} lladdr ${mac} dev ${bridge} nud permanent`]),
  ];
}

/**
 * Makes the instance's namespace and its veth, or what is missing of them: each step can be where a host before this
 * one died. A namespace that is there is kept, because the instance may be running in it.
 *
 * @throws {CommandError}
 * @throws {DormouseError} `insufficient_resources` where the bridge has no port left
 */
export async function attach(place: Place, instance: Instance, address: string): Promise<void> {
  const { id, network } = instance;
  const namespace = namespaceOf(place, id);
  // An address that its row does not tell, or tells otherwise, is one that nobody watches: it gets it at its next start.
  const wanted = network.ip6 === ip6Of(place, address) ? place : { ...place, subnet6: null };
  await orDetach(place, instance, address, () =>
    tie(wanted, namespace, address).catch((error: unknown) => {
      if (!(error instanceof CommandError) || isFull(error)) throw error;
      // A host that was killed can leave an `ip` that is still at it for a moment: look again, once. And a device whose
      // other end is not in this namespace was of one that is gone.
      return tie(wanted, namespace, address, { anew: /Cannot find device "eth0"/.test(error.stderr) });
    }));
}

/**
 * Makes the instance's TAP, which programs of `uid` may open, or what is missing of it. One that is there is kept: a
 * machine that outlived the host has it open.
 *
 * @throws {CommandError}
 * @throws {DormouseError} `insufficient_resources` where the bridge has no port left
 */
export async function attachTap(place: Place, instance: Instance, address: string, uid: number): Promise<void> {
  const device = deviceOf(address);
  const lines = devices().has(device) ? [] : [`tuntap add dev ${device} mode tap user ${uid}`];
  await orDetach(place, instance, address, () => ip([...lines, ...portLines(place, address)]));
}

async function orDetach(place: Place, { id, name }: Instance, address: string, work: () => Promise<void>) {
  try {
    await work();
  } catch (error) {
    if (!(error instanceof CommandError) || !isFull(error)) throw error;
    await detach(place, id, address); // it was not attached before, so nothing runs in it
    const message = `Cannot attach instance "${name}": bridge "${place.bridge}" has all the ports a bridge can have`;
    throw new DormouseError("insufficient_resources", message, { cause: error });
  }
}

function isFull({ stderr }: CommandError): boolean {
  return stderr.includes("Exchange full"); // EXFULL, of 1023 ports
}

async function tie(place: Place, namespace: string, address: string, { anew = false } = {}): Promise<void> {
  const whole = !anew && namespaceAt(namespace) === "namespace" && devices().has(deviceOf(address));
  if (whole) await ip(portLines(place, address));
  else await make(place, namespace, address);
  await ip(insideLines(place, address), namespace);
}

async function make(place: Place, namespace: string, address: string): Promise<void> {
  const [device, found] = [deviceOf(address), namespaceAt(namespace)];
  await ipEach([
    ...(devices().has(device) ? [`link delete dev ${device}`] : []),
    ...(found === "file" ? [`netns delete ${namespace}`] : []),
  ]);
  await ip([
    ...(found === "namespace" ? [] : [`netns add ${namespace}`]),
    `link add name ${device} type veth peer name eth0 address ${macOf(address)} netns ${namespace}`,
    ...portLines(place, address),
  ]);
}

// With the address alone, and no subnet, an instance asks the gateway for all others: nobody answers for isolated
// neighbours in IPv6 as the host does in IPv4. `nodad`: it is unique, and usable at once.
function insideLines(place: Place, address: string): string[] {
  const { subnet, subnet6 } = place;
  return [
    "link set dev eth0 up",
    "link set dev lo up",
    `addr replace ${address}/${subnet.prefix} dev eth0`,
    `route replace default via ${subnet.gateway}`,
    ...(subnet6 === null ? [] : [
      `addr replace ${ip6Of(place, address)}/128 dev eth0 nodad`,
      `route replace ${subnet6.gateway} dev eth0`,
      `route replace default via ${subnet6.gateway} dev eth0`,
    ]),
  ];
}

/**
 * Removes the instance's veth and the name of its namespace, which ends with the last process in it.
 *
 * @throws {CommandError}
 */
export async function detach(place: Place, id: string, address: string | null): Promise<void> {
  const [namespace, present] = [namespaceOf(place, id), devices()];
  const lines = namespaceAt(namespace) ? [`netns delete ${namespace}`] : [];
  if (address !== null && present.has(deviceOf(address))) lines.unshift(`link delete dev ${deviceOf(address)}`);
  if (address !== null && present.has(place.bridge)) {
    const neighbours = [address, ip6Of(place, address)].filter((each) => each !== null);
    lines.push(...neighbours.map((each) => `neigh del ${each} dev ${place.bridge}`));
  }
  await ipEach(lines);
}
