/**
 * The first byte after a wake against the same request awake, for a frozen process and for a machine that is gone; and a
 * published port, as the kernel forwards it, against the direct path and a userland pipe. In a network of its own.
 */
import { once } from "node:events";
import { mkdtempSync, rmSync } from "node:fs";
import { connect, createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { execa } from "execa";
import { type Hypervisor, loadPlugins, type Plugin, startHost } from "../../main.ts";
import conntrack from "../../plugins/conntrack/mod.ts";
import hypervisorPlugin from "../../plugins/hypervisor/mod.ts";
import network from "../../plugins/network/mod.ts";
import processes from "../../plugins/process/mod.ts";
import { HOST_DEFAULTS } from "../../plugins/shared/config.ts";
import { delay } from "../../plugins/shared/async.ts";
import { run } from "../../plugins/shared/run.ts";
import store from "../../plugins/store.ts";
import wakePlugin from "../../plugins/wake/mod.ts";
import { dial, splice } from "../../plugins/wake/splice.ts";
import { RUNTIME, until } from "../helpers.ts";

const ROUNDS = 200;
const SECONDS = 2;
/** Turns of all ways, of which each shows its best: other work on the machine only ever takes away. */
const TURNS = 3;
const ORIGIN = { actor: "bench", cause: "request" };
const PLACE = { bridge: "dmbench1", subnet: "10.123.0.0/24", subnet6: false };
const [GUEST, PUBLISHED, PIPED] = [8080, 20_080, 20_081];
const LOAD = join(import.meta.dirname!, "..", "wake", "load.ts");

async function main(): Promise<void> {
  const folder = mkdtempSync(join(tmpdir(), "dormouse-bench-"));
  const plugins = [store, network, hypervisorPlugin, processes, conntrack, wakePlugin] as Plugin[];
  const given = new Map(plugins.map((plugin) => [plugin.name, plugin]));
  const options = (name: string) => name === "network" ? PLACE : {};
  const tables = plugins.map(({ name }) => ({ name, options: options(name) }));
  const config = { dataDir: folder, host: HOST_DEFAULTS, plugins: tables };
  const host = await startHost(config, await loadPlugins(config, { given }));
  const hypervisor = host.use("hypervisor");
  const features = hypervisor.drivers()[0].features as Set<string>;
  const { id, network: { ip } } = await hypervisor.create({
    name: "bench",
    image: "host",
    cmd: [...RUNTIME, LOAD, "serve", String(GUEST)],
    wake: { ports: [{ host_port: PUBLISHED, guest_port: GUEST }] },
  }, ORIGIN);
  try {
    await until(
      "the kernel forwards its port",
      async () => /20080/.test(await run("nft", ["list", "map", "ip", `dormouse_wake_${PLACE.bridge}`, "wake"])),
    );
    console.log(`first byte, ${ROUNDS} rounds, milliseconds (p50 / p95 / p99)`);
    const awake = await times(async () => {});
    print("awake", awake);
    for (const [what, change] of [["frozen", "add"], ["gone", "delete"]] as const) {
      features[change]("queues");
      print(what, await times(() => asleep(hypervisor, id)), awake);
    }
    features.add("queues");
    await paths(ip!);
  } finally {
    await hypervisor.delete(id, ORIGIN);
    await host.close();
    rmSync(folder, { recursive: true, force: true });
  }
}

/** Milliseconds from the connection to the first byte. */
async function times(prepare: () => Promise<unknown>): Promise<number[]> {
  const found: number[] = [];
  for (let round = 0; round < ROUNDS; round++) {
    await prepare();
    const begin = performance.now();
    const socket = connect(PUBLISHED, "127.0.0.1").on("error", () => {});
    socket.write(Uint8Array.of(2));
    await once(socket, "data");
    found.push(performance.now() - begin);
    socket.resetAndDestroy();
  }
  return found.sort((a, b) => a - b);
}

/** From then on an event is taken at its word; just after the sleep it is checked against the table first. */
const SETTLED_MS = 120;

/** A connection of the round before may still be ending, which aborts the sleep. */
async function asleep(hypervisor: Hypervisor, id: string): Promise<void> {
  await until("it sleeps", async () => {
    await hypervisor.standby(id, ORIGIN).catch(() => {});
    return hypervisor.find(id)?.state === "Standby";
  });
  await delay(SETTLED_MS);
}

async function paths(ip: string): Promise<void> {
  const pipe = createServer({ allowHalfOpen: true }, async (client) => {
    client.on("error", () => {});
    splice(client, await dial(ip, GUEST, new AbortController().signal));
  });
  pipe.listen({ port: PIPED, host: "0.0.0.0", backlog: 1024 });
  await once(pipe, "listening");
  const ways = [["direct", ip, GUEST], ["published", "198.51.100.1", PUBLISHED], [
    "piped",
    "198.51.100.1",
    PIPED,
  ]] as const;
  for (const [mode, unit, scale] of [["stream", "Gbit/s", 8e-9], ["connects", "connections/s", 1]] as const) {
    console.log(`${mode}, best of ${TURNS} times ${SECONDS} s`);
    const best = ways.map(() => 0);
    for (let turn = 0; turn < TURNS; turn++) {
      for (const [i, [, host, port]] of ways.entries()) {
        const load = [...RUNTIME, LOAD, mode, host, String(port), String(SECONDS)];
        best[i] = Math.max(best[i], Number(await run("ip", ["netns", "exec", "world", ...load])) * scale);
      }
    }
    for (const [i, [name]] of ways.entries()) {
      const ratio = (best[i] / best[0]).toFixed(2);
      console.log(`  ${name.padEnd(10)} ${best[i].toFixed(1).padStart(8)} ${unit}   ${ratio}x direct`);
    }
  }
  pipe.close();
}

function print(what: string, found: number[], base?: number[]): void {
  const at = (list: number[], q: number) => list[Math.floor((list.length - 1) * q)];
  const figures = [0.5, 0.95, 0.99].map((q) => at(found, q).toFixed(2).padStart(7)).join(" / ");
  const over = base ? `   over awake ${(at(found, 0.5) - at(base, 0.5)).toFixed(2)} ms at p50` : "";
  console.log(`  ${what.padEnd(10)} ${figures}${over}`);
}

/** What the machine has is left alone: everything is in namespaces that end with this process. */
async function inside(): Promise<void> {
  const prepare = [
    "mkdir -p /run/netns /run/dormouse-bench-cgroup && mount -t tmpfs dormouse /run/netns",
    "mount --rbind /sys/fs/cgroup /run/dormouse-bench-cgroup && mount -t sysfs dormouse /sys",
    "mount --rbind /run/dormouse-bench-cgroup /sys/fs/cgroup && ip link set lo up",
    "ip netns add world && ip link add name world0 type veth peer name eth0 netns world",
    "ip addr add 198.51.100.1/24 dev world0 && ip link set dev world0 up",
    "ip -n world addr add 198.51.100.2/24 dev eth0 && ip -n world link set dev eth0 up",
    'ip -n world route add default via 198.51.100.1 && exec "$@"',
  ].join(" && ");
  const self = [...RUNTIME, join(import.meta.dirname!, "wake.ts"), "inside"];
  const { exitCode } = await execa("unshare", ["--net", "--mount", "sh", "-c", prepare, "sh", ...self], {
    stdio: "inherit",
    reject: false,
    timeout: 600_000,
  });
  process.exitCode = exitCode ?? 1;
}

if (process.argv[2] === "inside") await main();
else if (process.getuid?.() === 0) await inside();
else console.log("wake: needs root for namespaces, passed over");
