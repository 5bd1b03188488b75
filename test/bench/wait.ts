/**
 * How long after a change those who wait for it are answered: 1,000 waiters of one instance, and 1,000 of 1,000
 * instances, against the usual alternative, a poll of the state every 10 ms.
 */
import process from "node:process";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { definePlugin, type Driver, type Hypervisor, loadPlugins, type Plugin, startHost } from "../../main.ts";
import hypervisor from "../../plugins/hypervisor/mod.ts";
import { delay } from "../../plugins/shared/async.ts";
import { HOST_DEFAULTS } from "../../plugins/shared/config.ts";
import store from "../../plugins/store.ts";

const WAITERS = 1_000;
const ORIGIN = { actor: "bench", cause: "request" };

/** Changes state at once, so that what is measured is the registry and not a driver. */
const instant: Driver = {
  name: "instant",
  features: new Set(["standby"] as const),
  unavailable: () => null,
  validate() {},
  async create() {},
  start: async () => "Running",
  stop: async () => ({ exit_code: 0, exit_message: null }),
  async delete() {},
  inspect: async (instance) => instance.state === "Standby" ? { state: "Standby" } : { state: "Running" },
  adopt: async () => ({ state: "Running" }),
  async standby() {},
  restore: async () => "Running",
};

/** When each instance's last change was committed. */
const changed = new Map<string, number>();

const driver = definePlugin({
  name: "instant",
  requires: ["hypervisor"],
  setup(host) {
    host.use("hypervisor").register(instant);
    host.hooks.commit("instance:commit", ({ event }) => void changed.set(event.instance_id, performance.now()));
  },
});

export async function main(): Promise<void> {
  const folder = mkdtempSync(join(tmpdir(), "dormouse-bench-"));
  const plugins = [store, hypervisor, driver];
  const given = new Map(plugins.map((plugin) => [plugin.name, plugin as Plugin]));
  const tables = plugins.map(({ name }) => ({
    name,
    options: name === "hypervisor" ? { default_driver: "instant" } : {},
  }));
  const config = { dataDir: folder, host: HOST_DEFAULTS, plugins: tables };
  await using host = await startHost(config, await loadPlugins(config, { given }));
  const registry = host.use("hypervisor");
  try {
    const ids: string[] = [];
    for (let i = 0; i < WAITERS; i++) ids.push((await registry.create({ name: `w${i}`, image: "any" }, ORIGIN)).id);
    const one = Array.from({ length: WAITERS }, () => ids[0]);
    report("one instance", await measure(registry, one, waited), await measure(registry, one, polled));
    report("each its own", await measure(registry, ids, waited), await measure(registry, ids, polled));
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

type Wait = (registry: Hypervisor, id: string) => Promise<unknown>;
const waited: Wait = (registry, id) => registry.wait(id, "Standby", { timeout: 300_000 });
const polled: Wait = async (registry, id) => {
  while (registry.find(id)?.state !== "Standby") await delay(10);
};

/** Milliseconds from the commit of each change to the answer of each that waited for it, sorted. */
async function measure(registry: Hypervisor, ids: string[], wait: Wait): Promise<number[]> {
  const answers = ids.map(async (id) => {
    await wait(registry, id);
    return performance.now() - changed.get(id)!;
  });
  await delay(50);
  for (const id of new Set(ids)) {
    await registry.standby(id, ORIGIN);
    await delay(0);
  }
  const times = (await Promise.all(answers)).sort((a, b) => a - b);
  for (const id of new Set(ids)) await registry.restore(id, ORIGIN);
  return times;
}

function report(name: string, ours: number[], polling: number[]): void {
  const at = (times: number[], q: number) => times[Math.min(times.length - 1, Math.floor(times.length * q))];
  const line = (label: string, times: number[]) =>
    `  ${label.padEnd(16)} p50 ${at(times, 0.5).toFixed(3)} ms  p99 ${at(times, 0.99).toFixed(3)} ms  max ${
      at(times, 1).toFixed(3)
    } ms`;
  console.log(`wait: ${WAITERS} waiters, ${name}`);
  console.log(line("wait", ours));
  console.log(line("poll every 10 ms", polling));
  console.log(`  ratio poll/wait  p99 ${(at(polling, 0.99) / Math.max(at(ours, 0.99), 0.001)).toFixed(1)}x`);
}

if (import.meta.main) {
  await main();
  process.exit(0);
}
