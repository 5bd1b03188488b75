import type { TestContext } from "node:test";
import { definePlugin, type Feature, type Instance, type Plugin, type RunningHost, type Stats } from "../../main.ts";
import apiPlugin from "../../plugins/api/mod.ts";
import hypervisorPlugin from "../../plugins/hypervisor/mod.ts";
import { metricsPlugin } from "../../plugins/metrics/mod.ts";
import storePlugin from "../../plugins/store.ts";
import { ManualClock } from "../clock.ts";
import { startWith } from "../helpers.ts";
import { ScriptedDriver } from "../hypervisor/scripted.ts";

export const ORIGIN = { actor: "test", cause: "request" };

/** The scripted driver with stats, which are as the test says. */
export class CountingDriver extends ScriptedDriver {
  /** By name, what the next reading tells. */
  readonly uses = new Map<string, Partial<Stats>>();
  /** The names of those that were read, in order. */
  readonly reads: string[] = [];
  /** Runs at the begin of a reading; what it throws fails it. */
  reading: (instance: Instance) => void | Promise<void> = () => {};

  constructor() {
    super();
    (this.features as Set<Feature>).add("stats");
  }

  stats = async (instance: Instance): Promise<Stats> => {
    this.reads.push(instance.name);
    await this.reading(instance);
    const none = { cpu_seconds: 0, memory_rss_bytes: 0, memory_vms_bytes: 0, network_rx_bytes: 0, network_tx_bytes: 0 };
    return { ...none, ...this.uses.get(instance.name) };
  };
}

export interface MetricsWorld {
  host: RunningHost;
  driver: CountingDriver;
  clock: ManualClock;
  make(...names: string[]): Promise<Instance[]>;
  /** The text of `GET /metrics` at the API. */
  text(): Promise<string>;
  /** The same as a value for each series, which is written as in the text. */
  scrape(): Promise<Series>;
}
export interface WorldOptions {
  folder?: string;
  plugins?: Plugin[];
  /** The `[plugins.metrics]` table. */
  table?: Record<string, unknown>;
  tables?: Record<string, Record<string, unknown>>;
  driver?: CountingDriver;
}

/** A host with the real store, registry, API and metrics, on a driver and a clock that do as the test says. */
export async function metricsWorld(t: TestContext, options: WorldOptions = {}): Promise<MetricsWorld> {
  const { driver = new CountingDriver(), plugins = [], table = {}, tables = {}, folder } = options;
  const clock = new ManualClock();
  const scripted = definePlugin({
    name: "scripted",
    requires: ["hypervisor"],
    setup(host) {
      const registered = host.use("hypervisor").register(driver);
      host.defer(() => registered[Symbol.dispose]());
    },
  });
  const all = [storePlugin, hypervisorPlugin, scripted, apiPlugin, ...plugins, metricsPlugin(clock)] as Plugin[];
  const host = await startWith(t, all, {
    tables: {
      hypervisor: { default_driver: "scripted", reconcile_interval: "1h" },
      api: { listen: "127.0.0.1:0", access_log: false },
      metrics: table,
      ...tables,
    },
    ...(folder && { folder }),
  });
  const text = async () => {
    await new Promise((resolve) => setImmediate(resolve)); // events are handed over by the end of the turn
    return await (await fetch(`${host.use("api").url}/metrics`)).text();
  };
  return {
    host,
    driver,
    clock,
    text,
    scrape: async () => seriesOf(await text()),
    async make(...names) {
      const made: Instance[] = [];
      for (const name of names) made.push(await host.use("hypervisor").create({ name, image: "any" }, ORIGIN));
      return made;
    },
  };
}

export type Series = Record<string, number>;

/** Series and their values; what is no line of the text format is an error. */
export function seriesOf(text: string): Series {
  const series: Series = {};
  for (const line of text.split("\n")) {
    if (line === "" || /^# (HELP|TYPE) [a-z_]+ ./.test(line)) continue;
    const [, name, value] = /^([a-z_]+(?:\{(?:[a-z_]+="(?:[^"\\\n]|\\["\\n])*",?)+\})?) (\S+)$/.exec(line) ?? [];
    if (name === undefined) throw new Error(`No line of the text format: ${line}`);
    if (name in series) throw new Error(`Twice: ${name}`);
    series[name] = value === "+Inf" ? Infinity : Number(value);
  }
  return series;
}

/** Only the series of a metric. */
export function of(series: Series, metric: string): Series {
  return Object.fromEntries(
    Object.entries(series).filter(([name]) => name === metric || name.startsWith(`${metric}{`))
      .map(([name, value]) => [name.slice(metric.length), value]),
  );
}
