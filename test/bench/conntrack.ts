/**
 * Conntrack events per second, what is lost of them, and what reading them costs: netlink against the `conntrack`
 * program, in turn, with the same events. They are made by writing flows into the kernel's table and deleting them, in a
 * network namespace of its own, so that it is known to the last one how many there were.
 */
import { join } from "node:path";
import process from "node:process";
import { getLogger } from "@logtape/logtape";
import { execa } from "execa";
import { WatchedAddresses } from "../../plugins/conntrack/addresses.ts";
import { NetlinkSocket } from "../../plugins/conntrack/libc.ts";
import { openConntrack } from "../../plugins/conntrack/source.ts";
import { delay } from "../../plugins/shared/async.ts";
import { processes } from "../../plugins/shared/proc.ts";
import { RUNTIME } from "../helpers.ts";

const FILE = join(import.meta.dirname!, "conntrack.ts");
const FLOWS = 16;
const SECONDS = 2;
const RATES = [10_000, 100_000, Infinity];
const KINDS = ["netlink", "program"] as const;

interface Result {
  sent: number;
  heard: number;
  rate: number;
  /** Seconds, of the reader and of the programs it starts. */
  cpu: number;
  overflows: number;
}

async function measure(mode: typeof KINDS[number], rate: number, wanted: boolean): Promise<Result> {
  const addresses = wanted ? Array.from({ length: FLOWS }, (_, i) => `10.9.0.${i}`) : ["10.9.1.1"];
  const source = openConntrack({
    mode,
    log: getLogger(["dormouse", "bench"]),
    watched: new WatchedAddresses(addresses),
  });
  // As in the decision: found by the address.
  const instances = new Map(addresses.map((address) => [address, { events: 0 }]));
  const connected = Promise.withResolvers<void>();
  source.start({
    event: (_, flow) => void instances.get(flow.destination)!.events++,
    connected: () => connected.resolve(),
    lost: () => {},
  });
  await connected.promise;
  const before = cpu();
  const [command, ...flags] = RUNTIME;
  const { stdout } = await execa(command, [...flags, FILE, "generate", String(rate)], { timeout: 300_000 });
  for (let last = -1; last !== source.stats().messages; await delay(200)) last = source.stats().messages;
  const { messages, overflows } = source.stats();
  const used = cpu() - before;
  await source.close();
  const generator = JSON.parse(stdout) as { sent: number; seconds: number; cpu: number };
  const { sent, seconds } = generator;
  return { sent, heard: messages, rate: sent / seconds, cpu: Math.max(used - generator.cpu, 0), overflows };
}

/** Seconds of this process and of the `conntrack` programs it has, or has had. */
function cpu(): number {
  // What ended is in the parent's own number already.
  return processes().filter(({ pid, parent }) => pid === process.pid || parent === process.pid)
    .reduce((sum, { cpuSeconds }) => sum + cpuSeconds, 0);
}

/** Milliseconds from a flow in the kernel to the listener, of single flows with pauses between. */
async function latency(mode: typeof KINDS[number]): Promise<number[]> {
  const source = openConntrack({
    mode,
    log: getLogger(["dormouse", "bench"]),
    watched: new WatchedAddresses(["10.9.0.0"]),
  });
  const connected = Promise.withResolvers<void>();
  let heard = Promise.withResolvers<void>();
  source.start({
    event: (kind) => kind === "new" && heard.resolve(),
    connected: () => connected.resolve(),
    lost: () => {},
  });
  await connected.promise;
  using socket = new NetlinkSocket({ groups: 0, slots: 1, slotSize: 4096 });
  const times: number[] = [];
  for (let i = 0; i < 100; i++) {
    heard = Promise.withResolvers();
    const began = performance.now();
    socket.send(request(1));
    await heard.promise;
    times.push(performance.now() - began);
    await delay(20);
  }
  await source.close();
  return times.sort((a, b) => a - b);
}

/** Makes events for some seconds, and prints how many. */
async function generate(rate: number): Promise<void> {
  using socket = new NetlinkSocket({ groups: 0, slots: 1, slotSize: 4096 });
  const batch = request(FLOWS);
  const began = performance.now();
  let sent = 0;
  for (let now = began; now - began < SECONDS * 1000; now = performance.now()) {
    for (const due = Math.min(rate * (now - began) / 1000, sent + 250 * FLOWS); sent < due; sent += 2 * FLOWS) {
      socket.send(batch);
    }
    await delay(rate === Infinity ? 0 : 1);
  }
  const seconds = (performance.now() - began) / 1000;
  const { user, system } = process.cpuUsage();
  console.log(JSON.stringify({ sent, seconds, cpu: (user + system) / 1e6 }));
}

/** A flow of UDP for each of so many addresses, made and then deleted. */
function request(flows: number): Uint8Array<ArrayBuffer> {
  const each = Array.from({ length: flows }, (_, i) => [10, 9, 0, i]);
  const client = [10, 9, 2, 1];
  const directions = (server: number[]) => [
    ...attribute(1, tuple(client, server, 4000, 80), true),
    ...attribute(2, tuple(server, client, 80, 4000), true),
  ];
  return Uint8Array.from([
    ...each.flatMap((server) => message(0x100, 0x601, [...directions(server), ...attribute(7, [0, 0, 0, 60])])),
    ...each.flatMap((server) => message(0x102, 1, directions(server))),
  ]);
}

function message(type: number, flags: number, attributes: number[]): number[] {
  const length = 20 + attributes.length;
  return [
    ...little(length, 4),
    ...little(type, 2),
    ...little(flags, 2),
    ...Array(8).fill(0),
    2,
    0,
    0,
    0,
    ...attributes,
  ];
}

function tuple(source: number[], destination: number[], source_port: number, destination_port: number): number[] {
  const port = (number: number) => [number >> 8, number & 255];
  const addresses = [...attribute(1, source), ...attribute(2, destination)];
  const ports = [...attribute(1, [17]), ...attribute(2, port(source_port)), ...attribute(3, port(destination_port))];
  return [...attribute(1, addresses, true), ...attribute(2, ports, true)];
}

function attribute(type: number, payload: number[], nested = false): number[] {
  const padding = Array((4 - payload.length % 4) % 4).fill(0);
  return [...little(payload.length + 4, 2), ...little(nested ? type | 0x8000 : type, 2), ...payload, ...padding];
}

function little(number: number, bytes: number): number[] {
  return Array.from({ length: bytes }, (_, i) => (number >> 8 * i) & 255);
}

async function inside(): Promise<void> {
  for (const wanted of [true, false]) {
    for (const rate of RATES) {
      console.log(
        `conntrack: ${rate === Infinity ? "as many as can be" : rate} events/s ${wanted ? "to" : "not to"} instances`,
      );
      const results: Result[] = [];
      for (const kind of KINDS) {
        const result = await measure(kind, rate, wanted);
        results.push(result);
        const lost = 100 * (1 - result.heard / result.sent);
        console.log(
          `  ${kind.padEnd(8)} ${Math.round(result.rate).toLocaleString("en").padStart(8)} events/s  lost ${
            lost.toFixed(2).padStart(6)
          } %  overflows ${String(result.overflows).padStart(3)}  CPU ${
            (100 * result.cpu / SECONDS).toFixed(1).padStart(5)
          } % of a core  ${(1e6 * result.cpu / result.heard).toFixed(2)} us/event`,
        );
      }
      const cost = ({ cpu, heard }: Result) => cpu / heard;
      console.log(`  ratio program/netlink  CPU per event heard ${(cost(results[1]) / cost(results[0])).toFixed(1)}x`);
    }
  }
  console.log("conntrack: from the kernel to the listener, single events");
  for (const kind of KINDS) {
    const times = await latency(kind);
    const at = (q: number) => times[Math.floor((times.length - 1) * q)].toFixed(2);
    console.log(`  ${kind.padEnd(8)} p50 ${at(0.5)} ms  p99 ${at(0.99)} ms`);
  }
}

export async function main(): Promise<void> {
  if (!("Deno" in globalThis) || process.getuid?.() !== 0) {
    console.log("conntrack: not measured: it needs root and Deno's FFI");
    return;
  }
  const inner = ["sh", "-c", 'ip link set lo up && exec "$@"', "sh", ...RUNTIME, FILE, "inside"];
  await execa("unshare", ["--net", ...inner], { stdio: "inherit" });
}

if (import.meta.main) {
  const [what, rate] = process.argv.slice(2);
  await (what === "generate" ? generate(Number(rate)) : what === "inside" ? inside() : main());
}
