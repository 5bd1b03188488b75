/**
 * 1,000 instances that are probed by HTTP every second, in one host: how late the latest tick is, the lag of the event
 * loop, CPU and writes. The instances are addresses of loopback with one real server behind them, in a process of its
 * own. Then the same with 100 more that take the connection and never answer. Budgets: no tick missed (from one result
 * to the next at most two intervals), lag p99 under 20 ms, rows written a second bounded. The alternative is a bare loop
 * of `http.get` over the same addresses at the same rate, and a row written for each probe.
 */
import { once } from "node:events";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { get } from "node:http";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { execa } from "execa";
import {
  definePlugin,
  type Driver,
  loadPlugins,
  type Network,
  type Plugin,
  type RunningHost,
  startHost,
} from "../../main.ts";
import health from "../../plugins/health/mod.ts";
import hypervisor from "../../plugins/hypervisor/mod.ts";
import { delay, pooled } from "../../plugins/shared/async.ts";
import { HOST_DEFAULTS } from "../../plugins/shared/config.ts";
import store from "../../plugins/store.ts";
import { RUNTIME } from "../helpers.ts";

const ORIGIN = { actor: "bench", cause: "request" };
const INSTANCES = 1_000;
const SILENT = 100;
const INTERVAL_MS = 1_000;
const WARM_UP_MS = 5_000;
const MEASURED_MS = 30_000;
const BUDGET = { lag: 20, gap: 2 * INTERVAL_MS, rows: 100 };

const SERVER = `
import { createServer } from "node:http";
import { createServer as createSilent } from "node:net";
const http = createServer((_, response) => response.end("ok")).listen({ port: 0, host: "0.0.0.0", backlog: 4096 }, () => {
  const silent = createSilent((socket) => socket.on("error", () => {})).listen({ port: 0, host: "0.0.0.0", backlog: 4096 }, () => {
    console.log(http.address().port, silent.address().port);
  });
});
process.stdin.resume().on("end", () => process.exit());
`;

/** What is measured is the probing, and not a driver. */
const instant: Driver = {
  name: "instant",
  features: new Set(["host-network"] as const),
  unavailable: () => null,
  validate() {},
  async create() {},
  start: async () => "Running",
  stop: async () => ({ exit_code: 0, exit_message: null }),
  async delete() {},
  inspect: async () => ({ state: "Running" }),
  adopt: async () => ({ state: "Running" }),
};

const address = (i: number) => `127.1.${i >> 8}.${i & 255}`;

interface Figures {
  /** Results a second. */
  rate: number;
  /** Milliseconds from a result to the next one of the same instance: the median, and the longest of all. */
  gap: [median: number, longest: number];
  lag: [p50: number, p99: number, longest: number];
  /** Microseconds of this process. */
  cpu: number;
  /** Rows written a second. */
  rows: number;
  failed: number;
}

/** Takes figures over `MEASURED_MS`; `results` is filled meanwhile, by `rows()` rows have been written so far. */
async function measure(results: [id: string, at: number, ok: boolean][], rows: () => number): Promise<Figures> {
  await delay(WARM_UP_MS);
  const lag: number[] = [];
  let last = performance.now();
  const sampler = setInterval(() => {
    const now = performance.now();
    lag.push(Math.max(0, now - last - 5));
    last = now;
  }, 5);
  const [began, cpu, written, first] = [performance.now(), process.cpuUsage(), rows(), results.length];
  await delay(MEASURED_MS);
  clearInterval(sampler);
  const seconds = (performance.now() - began) / 1000;
  const { user, system } = process.cpuUsage(cpu);
  const taken = results.slice(first);
  const before = new Map(results.slice(0, first).map(([id, at]) => [id, at]));
  const gaps = taken.map(([id, at]) => {
    const gap = at - (before.get(id) ?? began);
    before.set(id, at);
    return gap;
  });
  // One that was never asked again has no next result: the time since its last one counts as well.
  const end = performance.now();
  gaps.push(...[...before.values()].map((at) => end - at));
  gaps.sort((a, b) => a - b);
  lag.sort((a, b) => a - b);
  const at = (sorted: number[], share: number) =>
    sorted[Math.min(Math.floor(sorted.length * share), sorted.length - 1)];
  return {
    rate: taken.length / seconds,
    gap: [at(gaps, 0.5), gaps.at(-1)!],
    lag: [at(lag, 0.5), at(lag, 0.99), lag.at(-1)!],
    cpu: (user + system) / taken.length,
    rows: (rows() - written) / seconds,
    failed: taken.filter(([, , ok]) => !ok).length,
  };
}

async function hosted(work: (host: RunningHost) => Promise<Figures>): Promise<Figures> {
  let last = 0;
  const network = {
    enabled: true,
    gateway: "127.0.0.1",
    allocate: () => ({ ip: address(last++), ip6: null, mac: "" }),
    release() {},
  } as unknown as Network;
  const surroundings = definePlugin({
    name: "surroundings",
    provides: ["network"],
    setup: (host) => host.provide("network", network),
  });
  const driver = definePlugin({
    name: "instant",
    requires: ["hypervisor"],
    setup: (host) => void host.use("hypervisor").register(instant),
  });
  const folder = mkdtempSync(join(tmpdir(), "dormouse-bench-"));
  const plugins = [store, surroundings, hypervisor, driver, health] as Plugin[];
  const options: Record<string, Record<string, unknown>> = { hypervisor: { default_driver: "instant" } };
  const given = new Map(plugins.map((plugin) => [plugin.name, plugin]));
  const tables = plugins.map(({ name }) => ({ name, options: options[name] ?? {} }));
  const config = { dataDir: folder, host: { ...HOST_DEFAULTS, event_buffer: 100_000 }, plugins: tables };
  try {
    await using host = await startHost(config, await loadPlugins(config, { given }));
    return await work(host);
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

/** The plugin, with so many instances beside the others that never answer. */
function ours(port: number, silentPort: number, silent: number): Promise<Figures> {
  return hosted(async (host) => {
    const results: [string, number, boolean][] = [];
    host.hooks.on("health:probed", ({ instance_id, ok }) => void results.push([instance_id, performance.now(), ok]));
    const registry = host.use("hypervisor");
    const all = Array.from({ length: INSTANCES + silent }, (_, i) => i);
    const timing = { interval: `${INTERVAL_MS}ms`, timeout: `${INTERVAL_MS / 2}ms` };
    await pooled(16, all, (i) => {
      const http = { port: i < INSTANCES ? port : silentPort };
      return registry.create({ name: `i${i}`, image: "any", health_check: { ...timing, http } }, ORIGIN);
    });
    const { db } = host.use("store");
    const rows = db.prepare("SELECT total_changes() AS n");
    return await measure(results, () => rows.get()!.n as number);
  });
}

/** One timer for each address, and nothing around it. */
async function bare(port: number): Promise<Figures> {
  const results: [string, number, boolean][] = [];
  let closed = false;
  const probe = (host: string) => {
    const done = (ok: boolean) => {
      results.push([host, performance.now(), ok]);
      if (!closed) setTimeout(probe, INTERVAL_MS, host);
    };
    const request = get({ host, port, agent: false }, (response) => {
      response.resume();
      response.once("end", () => done(response.statusCode === 200));
    });
    request.once("error", () => done(false));
  };
  for (let i = 0; i < INSTANCES; i++) setTimeout(probe, Math.random() * INTERVAL_MS, address(i));
  const figures = await measure(results, () => results.length);
  closed = true;
  await delay(INTERVAL_MS + 100);
  return figures;
}

function line(name: string, { rate, gap, lag, cpu, rows }: Figures): void {
  const [median, longest] = gap.map((ms) => ms.toFixed(0));
  const [p50, p99, most] = lag.map((ms) => ms.toFixed(1));
  console.log(
    `health: ${name.padEnd(28)} ${
      rate.toFixed(0).padStart(5)
    } probes/s, next after ${median} (at most ${longest}) ms, ` +
      `lag p50 ${p50} p99 ${p99} max ${most} ms, ${cpu.toFixed(0)} us CPU a probe, ${rows.toFixed(0)} rows/s`,
  );
}

export async function main(): Promise<void> {
  const [command, ...flags] = RUNTIME;
  const folder = mkdtempSync(join(tmpdir(), "dormouse-bench-"));
  const file = join(folder, "server.mjs");
  writeFileSync(file, SERVER);
  const server = execa(command, [...flags, file], { stdin: "pipe", buffer: false, reject: false });
  try {
    const [text] = await once(server.stdout, "data");
    const [port, silentPort] = String(text).trim().split(" ").map(Number);
    const alone = await bare(port);
    const all = await ours(port, silentPort, 0);
    const hung = await ours(port, silentPort, SILENT);
    line("a bare loop of http.get", alone);
    line(`${INSTANCES} instances`, all);
    line(`and ${SILENT} that never answer`, hung);
    console.log(`health: CPU of a probe ${(all.cpu / alone.cpu).toFixed(2)}x that of the bare loop`);
    for (const { gap, lag, rows, failed } of [all, hung]) {
      const met = gap[1] <= BUDGET.gap && lag[1] < BUDGET.lag && rows <= BUDGET.rows;
      const wanted = `next within ${BUDGET.gap} ms, lag p99 < ${BUDGET.lag} ms, at most ${BUDGET.rows} rows/s`;
      console.log(`health: budget (${wanted}): ${met ? "met" : "MISSED"}; ${failed} probes failed`);
    }
  } finally {
    server.stdin.end();
    await server;
    rmSync(folder, { recursive: true, force: true });
  }
}

if (import.meta.main) {
  await main();
  process.exit(0);
}
