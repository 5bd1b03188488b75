/**
 * `GET /instances` with 1,000 instances against a bare Hono route that returns the same bytes, in process and over a
 * socket, with the access log on as it is by default. The two take turns, so that both see the same machine.
 */
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { getLogger } from "@logtape/logtape";
import { Hono } from "hono";
import { type Api, type ApiRoute, definePlugin, loadPlugins, type Plugin, startHost } from "../../main.ts";
import { createApp } from "../../plugins/api/app.ts";
import { Idempotency } from "../../plugins/api/idempotency.ts";
import { instanceRoutes } from "../../plugins/api/routes/instances.ts";
import { listen } from "../../plugins/api/server.ts";
import hypervisor from "../../plugins/hypervisor/mod.ts";
import { HOST_DEFAULTS } from "../../plugins/shared/config.ts";
import store from "../../plugins/store.ts";
import { ScriptedDriver } from "../hypervisor/scripted.ts";

const INSTANCES = 1_000;
const ROUNDS = 30;
const PER_ROUND = 20;
const ORIGIN = { actor: "bench", cause: "request" };

type Fetch = (request: Request) => Response | Promise<Response>;

const routes: ApiRoute[] = [];
const driver = definePlugin({
  name: "scripted",
  requires: ["store", "hypervisor"],
  setup(host) {
    const registry = host.use("hypervisor");
    registry.register(new ScriptedDriver());
    const stream = () => Response.error();
    const api: Api = { url: "", route: (route) => void routes.push(route), stream };
    instanceRoutes(api, registry, new Idempotency(host.use("store"), registry, host.hooks));
  },
});

export async function main(): Promise<void> {
  const folder = mkdtempSync(join(tmpdir(), "dormouse-bench-"));
  const plugins = [store, hypervisor, driver] as Plugin[];
  const tables = plugins.map(({ name }) => ({
    name,
    options: name === "hypervisor" ? { default_driver: "scripted" } : {},
  }));
  const config = { dataDir: folder, host: HOST_DEFAULTS, plugins: tables };
  const given = new Map(plugins.map((plugin) => [plugin.name, plugin]));
  await using host = await startHost(config, await loadPlugins(config, { given }));
  try {
    for (let i = 0; i < INSTANCES; i++) {
      const body = {
        name: `w${i}`,
        image: "host",
        cmd: ["serve", "--port", "8080"],
        env: { PORT: "8080" },
        tags: { i: `${i}` },
      };
      await host.use("hypervisor").create(body, ORIGIN);
    }
    const options = { request_timeout: 300_000, tokens: [], access_log: true };
    const log = getLogger(["dormouse", "api"]);
    const closing = new AbortController().signal;
    const ours = createApp(routes, { options, log, closing, trusting: true, plugins: new Map(), answered: () => {} });
    const text = await (await ours.request("/instances")).text();
    const bare = new Hono().get("/instances", (c) => c.body(text, 200, { "Content-Type": "application/json" }));
    console.log(`list: ${INSTANCES} instances, ${text.length} bytes`);
    await compare("in process", ours.fetch as Fetch, bare.fetch as Fetch);
    const address = { hostname: "127.0.0.1", port: 0 };
    const servers = [await listen(ours.fetch, address), await listen(bare.fetch, address)];
    const over = ({ url }: { url: string }): Fetch => () => fetch(`${url}/instances`);
    await compare("over a socket", over(servers[0]), over(servers[1]));
    for (const server of servers) await server.close(0);
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

async function compare(name: string, ours: Fetch, bare: Fetch): Promise<void> {
  const request = () => new Request("http://127.0.0.1/instances");
  const times: [number[], number[]] = [[], []];
  for (let round = -5; round < ROUNDS; round++) {
    for (const [index, fetch] of [ours, bare].entries()) {
      const begun = performance.now();
      for (let i = 0; i < PER_ROUND; i++) await (await fetch(request())).arrayBuffer();
      // The first rounds warm up.
      if (round >= 0) times[index].push((performance.now() - begun) / PER_ROUND);
    }
  }
  // The lower quartile: what else the machine does makes the rest longer, and by chance more of one than the other.
  const [a, b] = times.map((each) => each.toSorted((x, y) => x - y)[Math.floor(each.length / 4)]);
  console.log(`  ${name.padEnd(14)} GET /instances ${a.toFixed(3)} ms  bare Hono ${b.toFixed(3)} ms`);
  console.log(`  ${name.padEnd(14)} ratio ours/bare ${(a / b).toFixed(2)}x  (budget over a socket: 2x)`);
}

if (import.meta.main) {
  await main();
  process.exit(0);
}
