/** What the tests inside a network of their own share: a host with the network, instances, and who talks to whom. */
import { once } from "node:events";
import { writeFileSync } from "node:fs";
import { connect } from "node:net";
import { join } from "node:path";
import type { TestContext } from "node:test";
import { execa } from "execa";
import type { Instance, Network, RunningHost } from "../../main.ts";
import networkPlugin from "../../plugins/network/mod.ts";
import { run } from "../../plugins/shared/run.ts";
import storePlugin from "../../plugins/store.ts";
import { cleanup, RUNTIME, startWith, temporaryFolder } from "../helpers.ts";

export const BRIDGE = "dmtest0";
export const SUBNET = "10.89.7.0/24";
export const GATEWAY = "10.89.7.1";
/** What is made of {@linkcode SUBNET}. */
export const SUBNET6 = "fdd0:18:a59:700::/64";
export const GATEWAY6 = "fdd0:18:a59:700::1";

export interface World {
  folder: string;
  host: RunningHost;
  network: Network;
  /** An instance with an address, reserved durably. */
  instance(id: string): Instance;
}

/** A host with the network plugin; the same folder again is a restart. */
export async function worldOf(
  t: TestContext,
  folder: string = temporaryFolder(t),
  options: Record<string, string | boolean> = {},
): Promise<World> {
  const table = { bridge: BRIDGE, subnet: SUBNET, ...options };
  const host = await startWith(t, [storePlugin, networkPlugin, reader], { folder, tables: { network: table } });
  const network = host.use("network");
  const instance = (id: string) => {
    const address = host.use("store").transaction(() => network.allocate(id));
    return { id, name: id, network: { enabled: true, ...address } } as Instance;
  };
  return { folder, host, network, instance };
}

// startHost() gives the test every service; this one only shows that a plugin can require them.
const reader = { name: "reader", requires: ["network", "store"] as const, setup: () => {} };

/** Starts {@linkcode file://./greeter.ts} in a namespace and waits until it listens. */
export async function greeterIn(t: TestContext, namespace: string, port: number, address = "0.0.0.0"): Promise<void> {
  const script = join(import.meta.dirname!, "greeter.ts");
  const child = execa("ip", ["netns", "exec", namespace, ...RUNTIME, script, String(port), address], {
    stdin: "ignore",
    buffer: false,
    reject: false,
  });
  cleanup(t).defer(async () => {
    child.kill("SIGKILL");
    await child;
  });
  await once(child.stdout, "data");
}

/** What a greeter says to this process. @throws where it cannot be reached */
export async function greet(host: string, port: number): Promise<string> {
  const socket = connect({ host, port });
  // A SYN that got lost is sent again after 1, 3 and 7 seconds.
  const late = setTimeout(() => socket.destroy(new Error("no answer")), 10_000);
  try {
    let text = "";
    for await (const chunk of socket) text += chunk;
    return text;
  } finally {
    clearTimeout(late);
  }
}

/** What a greeter says to a namespace, null where it cannot be reached within so many seconds. */
export async function greetFrom(namespace: string, host: string, port: number, seconds = 15): Promise<string | null> {
  const script = `cat < /dev/tcp/${host}/${port}`;
  const bounded = ["timeout", String(seconds), "bash", "-c", script];
  const { stdout, failed } = await execa("ip", ["netns", "exec", namespace, ...bounded], { reject: false });
  return failed ? null : stdout;
}

/**
 * Pings, from a namespace where one is given. Twice if need be: the kernel lets a port's first packets go until a worker
 * of its own has seen that there is a carrier, some moments after the port is up.
 */
export async function reach(address: string, namespace?: string): Promise<string> {
  const inside = namespace ? ["ip", "netns", "exec", namespace] : [];
  const [command, ...args] = [...inside, "ping", "-c", "1", "-W", "2", address];
  try {
    return await run(command, args);
  } catch {
    return await run(command, args);
  }
}

/** All that a network can leave behind, apart from counters. */
export async function traces(): Promise<string> {
  const links = JSON.parse(await run("ip", ["-j", "addr"])) as { ifname: string; addr_info: { local: string }[] }[];
  const names = links.map(({ ifname, addr_info }) => [ifname, ...addr_info.map(({ local }) => local)].join(" "));
  return [...names.sort(), await run("ip", ["netns"]), await run("nft", ["list", "ruleset"])].join("\n");
}

/** A config file of the same host, for the real `main.ts`. */
export function configIn(folder: string): string {
  const file = join(folder, "purge.toml");
  writeFileSync(
    file,
    `data_dir = "data"\n[plugins.store]\n[plugins.network]\nbridge = "${BRIDGE}"\nsubnet = "${SUBNET}"\n`,
  );
  return file;
}
