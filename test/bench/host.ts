/**
 * What the host itself costs: from its start to the first answer of the API, its memory, and its CPU while nothing
 * happens, with no instance and with 10,000 sleeping ones in the store. The alternative is an HTTP server of three
 * lines on the same runtime, which is the least that could answer.
 */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { execa } from "execa";
import { stringify } from "smol-toml";
import { definePlugin, type Instance, loadPlugins, type Plugin, startHost } from "../../main.ts";
import { Records } from "../../plugins/hypervisor/records.ts";
import { delay } from "../../plugins/shared/async.ts";
import { HOST_DEFAULTS } from "../../plugins/shared/config.ts";
import store from "../../plugins/store.ts";
import { ROOT, RUNTIME } from "../helpers.ts";

const SLEEPING = 10_000;
const IDLE_MS = 10_000;
const TICKS_PER_SECOND = 100; // USER_HZ, the unit of /proc/PID/stat on Linux

const BARE = 'import { createServer } from "node:http";\n' +
  'createServer((_, response) => response.end("{}")).listen(Number(process.argv[2]), "127.0.0.1");\n';
/** A driver whose instances sleep: what is measured is the host and not the machine's cgroups. */
const ASLEEP = `export default {
  name: "asleep", requires: ["hypervisor"],
  setup(host) {
    const sleeping = async () => ({ state: "Standby" });
    const nothing = async () => {};
    host.use("hypervisor").register({
      name: "asleep", features: new Set(["standby"]), unavailable: () => null, validate() {}, create: nothing,
      start: async () => "Running", stop: async () => ({ exit_code: 0, exit_message: null }), delete: nothing,
      inspect: sleeping, adopt: sleeping, standby: nothing, restore: async () => "Running",
    });
  },
};\n`;

interface Figures {
  start_ms: number;
  rss_mb: number;
  cpu_percent: number;
}

export async function main(): Promise<void> {
  const folder = mkdtempSync(join(tmpdir(), "dormouse-bench-"));
  try {
    writeFileSync(join(folder, "bare.mjs"), BARE);
    writeFileSync(join(folder, "asleep.mjs"), ASLEEP);
    const bare = await measure((port) => [join(folder, "bare.mjs"), String(port)]);
    const none = await measure((port) => hostArguments(folder, "none", port));
    await fill(join(folder, "many"));
    const many = await measure((port) => hostArguments(folder, "many", port));
    console.log("host: start to first answer, memory, CPU while idle");
    const line = (name: string, { start_ms, rss_mb, cpu_percent }: Figures) =>
      `  ${name.padEnd(28)}${start_ms.toFixed(0).padStart(6)} ms ${rss_mb.toFixed(0).padStart(5)} MB ` +
      `${cpu_percent.toFixed(2).padStart(6)} %   start ${(start_ms / bare.start_ms).toFixed(1)}x, memory ${
        (rss_mb / bare.rss_mb).toFixed(1)
      }x`;
    console.log(line("bare HTTP server", bare));
    console.log(line("host, no instance", none));
    console.log(line(`host, ${SLEEPING} sleeping`, many));
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

function hostArguments(folder: string, name: string, port: number): string[] {
  const file = join(folder, `${name}.toml`);
  const plugins = {
    store: {},
    hypervisor: { default_driver: "asleep" },
    asleep: { use: "./asleep.mjs" },
    api: { listen: `127.0.0.1:${port}` },
  };
  writeFileSync(file, stringify({ data_dir: name, host: { log_level: "warning" }, plugins }));
  return [join(ROOT, "main.ts"), "--config", file];
}

/** Rows as a host leaves them whose instances all sleep. */
async function fill(dataDir: string): Promise<void> {
  const filler = definePlugin({
    name: "filler",
    requires: ["store"],
    setup(host) {
      const records = new Records(host.use("store"), host.hooks);
      const origin = { actor: "bench", cause: "fill" };
      host.use("store").transaction(() => {
        for (let i = 0; i < SLEEPING; i++) records.insert(row(i), { action: "create", origin });
      });
    },
  });
  const plugins = [store, filler] as Plugin[];
  const given = new Map(plugins.map((plugin) => [plugin.name, plugin]));
  const config = { dataDir, host: HOST_DEFAULTS, plugins: plugins.map(({ name }) => ({ name, options: {} })) };
  await (await startHost(config, await loadPlugins(config, { given }))).close();
}

function row(i: number): Instance {
  const now = Date.now();
  return {
    id: `sleeper${String(i).padStart(17, "0")}`,
    name: `sleeper-${i}`,
    driver: "asleep",
    image: "host",
    entrypoint: [],
    cmd: ["python3", "-m", "http.server", "8000"],
    env: { LANG: "C.UTF-8", TOKEN: "0123456789abcdef0123456789abcdef" },
    working_dir: null,
    run_as: null,
    tags: { team: "bench", shard: String(i % 16) },
    vcpus: 1,
    memory_bytes: 2 ** 28,
    hints: {},
    network: { enabled: true, ip: `10.88.${i >> 8}.${i & 255}`, mac: "02:d0:0a:58:00:02", ip6: null },
    state: "Standby",
    state_error: null,
    transition: null,
    created_at: now,
    started_at: now,
    stopped_at: null,
    expires_at: null,
    exit_code: null,
    exit_message: null,
    phases: { since: now, totals: { Created: 40, Running: 60_000, Paused: 5 } },
    policies: {},
    revision: 4,
  } as Instance;
}

async function measure(args: (port: number) => string[]): Promise<Figures> {
  const port = await freePort();
  const [command, ...flags] = RUNTIME;
  const begin = performance.now();
  const child = execa(command, [...flags, ...args(port)], { stdio: ["ignore", "ignore", "inherit"], reject: false });
  try {
    const answers = () =>
      fetch(`http://127.0.0.1:${port}/health`).then(async (r) => (await r.text(), true), () => false);
    while (!await answers()) {
      if (performance.now() - begin > 60_000) throw new Error("no answer within a minute");
      await delay(5);
    }
    const start_ms = performance.now() - begin;
    await delay(1_000);
    const before = ticks(child.pid!);
    await delay(IDLE_MS);
    const cpu_percent = (ticks(child.pid!) - before) / TICKS_PER_SECOND / (IDLE_MS / 1000) * 100;
    const kb = Number(/VmRSS:\s+(\d+)/.exec(readFileSync(`/proc/${child.pid}/status`, "utf8"))![1]);
    return { start_ms, rss_mb: kb / 1024, cpu_percent };
  } finally {
    process.kill(child.pid!, "SIGTERM");
    await child;
  }
}

/** User and system time so far. */
function ticks(pid: number): number {
  const fields = readFileSync(`/proc/${pid}/stat`, "utf8").split(") ")[1].split(" ");
  return Number(fields[11]) + Number(fields[12]);
}

async function freePort(): Promise<number> {
  const server = createServer();
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const { port } = server.address() as { port: number };
  await new Promise((resolve) => server.close(resolve));
  return port;
}

if (import.meta.main) await main();
