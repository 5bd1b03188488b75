/**
 * Create to Running, standby, restore and delete of a real process through the registry, with all that a root host
 * gives it (namespace, veth, cgroup), against the least that does the same to a bare process: a spawn, SIGSTOP, SIGCONT
 * and SIGKILL, each with the wait until the kernel says so.
 */
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { execa } from "execa";
import { loadPlugins, type Plugin, startHost } from "../../main.ts";
import hypervisor from "../../plugins/hypervisor/mod.ts";
import network from "../../plugins/network/mod.ts";
import processes from "../../plugins/process/mod.ts";
import { delay } from "../../plugins/shared/async.ts";
import { HOST_DEFAULTS } from "../../plugins/shared/config.ts";
import { run } from "../../plugins/shared/run.ts";
import store from "../../plugins/store.ts";

const ROUNDS = 100;
const ORIGIN = { actor: "bench", cause: "request" };
const PLACE = { bridge: "dmbench0", subnet: "10.122.0.0/16" };
const STEPS = ["create", "standby", "restore", "delete"] as const;

type Times = Record<(typeof STEPS)[number], number[]>;
type Timed = Record<(typeof STEPS)[number], () => Promise<unknown>>;

export async function main(): Promise<void> {
  const folder = mkdtempSync(join(tmpdir(), "dormouse-bench-"));
  const plugins = [store, network, hypervisor, processes] as Plugin[];
  const given = new Map(plugins.map((plugin) => [plugin.name, plugin]));
  const options = (name: string) => name === "network" ? PLACE : {};
  const config = {
    dataDir: folder,
    host: HOST_DEFAULTS,
    plugins: plugins.map(({ name }) => ({ name, options: options(name) })),
  };
  const host = await startHost(config, await loadPlugins(config, { given }));
  const registry = host.use("hypervisor");
  const ours = empty();
  const bare = empty();
  try {
    for (let round = 0; round < ROUNDS; round++) {
      let id = "";
      await time(ours, {
        create: async () =>
          id = (await registry.create({ name: `b${round}`, image: "host", cmd: ["sleep", "1000"] }, ORIGIN)).id,
        standby: () => registry.standby(id, ORIGIN),
        restore: () => registry.restore(id, ORIGIN),
        delete: () => registry.delete(id, ORIGIN),
      });
      await time(bare, bareProcess());
    }
  } finally {
    await host.close();
    rmSync(folder, { recursive: true, force: true });
    if (process.getuid?.() === 0) await run("ip", ["link", "delete", "dev", PLACE.bridge]);
    if (process.getuid?.() === 0) await run("nft", ["delete", "table", "inet", `dormouse_net_${PLACE.bridge}`]);
  }
  console.log(`lifecycle of a process, ${ROUNDS} rounds, milliseconds (p50 / p99)`);
  for (const step of STEPS) {
    const [a, b] = [ours[step], bare[step]].map((times) => times.sort((x, y) => x - y));
    const at = (times: number[], q: number) => times[Math.floor((times.length - 1) * q)];
    const figures = (times: number[]) =>
      `${at(times, 0.5).toFixed(2).padStart(7)} / ${at(times, 0.99).toFixed(2).padStart(7)}`;
    console.log(
      `  ${step.padEnd(8)} ours ${figures(a)}   bare ${figures(b)}   ratio ${(at(a, 0.5) / at(b, 0.5)).toFixed(1)}x`,
    );
  }
}

const empty = (): Times => ({ create: [], standby: [], restore: [], delete: [] });

async function time(times: Times, timed: Timed): Promise<void> {
  for (const step of STEPS) {
    const begin = performance.now();
    await timed[step]();
    times[step].push(performance.now() - begin);
  }
}

function bareProcess(): Timed {
  let pid = 0;
  let ended: Promise<unknown> = Promise.resolve();
  const state = () => readFileSync(`/proc/${pid}/stat`, "utf8").split(") ")[1][0];
  const until = async (wanted: boolean) => {
    while ((state() === "T") !== wanted) await delay(0);
  };
  return {
    create: async () => {
      const child = execa("setsid", ["sleep", "1000"], { stdio: "ignore", reject: false });
      ended = child;
      pid = child.pid!;
      while (!readFileSync(`/proc/${pid}/cmdline`, "utf8").startsWith("sleep")) await delay(0);
    },
    standby: async () => (process.kill(pid, "SIGSTOP"), await until(true)),
    restore: async () => (process.kill(pid, "SIGCONT"), await until(false)),
    delete: async () => (process.kill(pid, "SIGKILL"), await ended),
  };
}

if (import.meta.main) {
  await main();
  process.exit(0);
}
