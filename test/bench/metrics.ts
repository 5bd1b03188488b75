/**
 * A scrape with 1,000 running processes: the CPU time that it takes, which is no less than what it keeps the event loop
 * busy for, where readings are due and where they are new; against reading all of them in one go.
 */
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { type Api, type ApiRoute, definePlugin, loadPlugins, type Plugin, startHost } from "../../main.ts";
import hypervisor from "../../plugins/hypervisor/mod.ts";
import metrics from "../../plugins/metrics/mod.ts";
import processes from "../../plugins/process/mod.ts";
import { delay, pooled } from "../../plugins/shared/async.ts";
import { HOST_DEFAULTS } from "../../plugins/shared/config.ts";
import store from "../../plugins/store.ts";

const INSTANCES = 1_000;
const SCRAPES = 8;
/** Milliseconds. */
const BUDGET = 50;
const ORIGIN = { actor: "bench", cause: "request" };
/** For how long readings are kept, and within which all of them are read; milliseconds. */
const MAX_AGE = 8_000;
const READ_WITHIN = 6_000;

let route: ApiRoute | undefined;
const api = definePlugin({
  name: "api",
  provides: ["api"],
  setup(host) {
    host.provide("api", { url: "", route: (added: ApiRoute) => void (route = added) } as unknown as Api);
  },
});

export async function main(): Promise<void> {
  const folder = mkdtempSync(join(tmpdir(), "dormouse-bench-"));
  const plugins = [store, hypervisor, processes, api, metrics] as Plugin[];
  const options: Record<string, Record<string, unknown>> = {
    hypervisor: { reconcile_interval: "1h" },
    metrics: { stats_max_age: `${MAX_AGE}ms` },
  };
  const tables = plugins.map(({ name }) => ({ name, options: options[name] ?? {} }));
  const given = new Map(plugins.map((plugin) => [plugin.name, plugin]));
  const config = { dataDir: folder, host: HOST_DEFAULTS, plugins: tables };
  await using host = await startHost(config, await loadPlugins(config, { given }));
  const registry = host.use("hypervisor");
  try {
    await pooled(4, Array.from({ length: INSTANCES }), async () => {
      await registry.create({ name: `w${next()}`, image: "host", cmd: ["sleep", "3600"] }, ORIGIN);
    });
    const scrape = async () => await (await route!.handle({} as never) as Response).text();
    const due: Cost[] = [];
    const after: Cost[] = [];
    const kept: Cost[] = [];
    const idle: Cost[] = [];
    for (let i = -1; i < SCRAPES; i++) {
      const [first, rest] = [await costOf(scrape), await costOf(() => delay(READ_WITHIN))];
      const again = await costOf(scrape);
      const quiet = await costOf(() => delay(MAX_AGE - READ_WITHIN + 100));
      if (i < 0) continue; // warming up
      due.push(first);
      after.push(rest);
      kept.push(again);
      idle.push(quiet);
    }
    const text = await scrape();
    const read = /reads_total{result="ok"} (\d+)/.exec(text)![1];
    console.log(
      `metrics: ${INSTANCES} processes, ${text.split("\n").length} lines, ${text.length} bytes, ${read} readings`,
    );
    show("readings are due", due);
    show("readings are new", kept);
    show("the readings after", after, `over ${READ_WITHIN / 1_000} s`);
    show("nothing at all", idle, `over ${(MAX_AGE - READ_WITHIN) / 1_000} s, for comparison`);
    const all = await costOf(async () => {
      for (const instance of registry.list()) await registry.driverOf(instance, "stats").stats(instance);
    });
    show("all in one go", [all], "for comparison");
    const worst = Math.max(...due.map(({ cpu }) => cpu));
    console.log(`  CPU of a scrape at most ${worst.toFixed(1)} ms  (budget ${BUDGET} ms of the loop)`);
  } finally {
    await pooled(4, registry.list(), ({ id }) => registry.delete(id, ORIGIN));
    rmSync(folder, { recursive: true, force: true });
  }
}

let made = 0;
function next(): number {
  return made++;
}

interface Cost {
  /** Milliseconds of CPU that this process used, with those of its threads that compile and collect. */
  cpu: number;
  /** Milliseconds until it was over. */
  took: number;
}

async function costOf(work: () => Promise<unknown>): Promise<Cost> {
  const [cpu, begun] = [process.cpuUsage(), performance.now()];
  await work();
  const { user, system } = process.cpuUsage(cpu);
  return { cpu: (user + system) / 1_000, took: performance.now() - begun };
}

function show(name: string, costs: Cost[], more = ""): void {
  const of = (key: keyof Cost) => median(costs.map((cost) => cost[key])).toFixed(1);
  console.log(
    `  ${name.padEnd(20)} CPU p50 ${of("cpu").padStart(6)} ms  answered after ${of("took").padStart(6)} ms ${more}`,
  );
}

function median(values: number[]): number {
  return values.toSorted((a, b) => a - b)[Math.floor(values.length / 2)];
}

if (import.meta.main) {
  await main();
  process.exit(0);
}
