/**
 * The plugin `metrics`: what the host does and what its instances use, for Prometheus. `table.ts` is the table of all
 * metrics; `meters.ts` makes prom-client's of it; `sources.ts` says where the numbers come from, with `phases.ts` (time in
 * states), `usage.ts` (what instances use), `lag.ts` and `process.ts` (this process); `listener.ts` is a listener of its own;
 * `dashboard.ts` and `docs.ts` make the Grafana dashboard and the README's table from the same table.
 */
import * as v from "valibot";
import { definePlugin, DormouseError, type Host } from "../../main.ts";
import type { Clock } from "../shared/clock.ts";
import { messageOf } from "../shared/errors.ts";
import { isLocal, parseListen } from "../shared/listen.ts";
import { duration } from "../shared/schemas.ts";
import { steadyClock } from "./lag.ts";
import { listen } from "./listener.ts";
import { Meters } from "./meters.ts";
import { type Collect, SOURCES } from "./sources.ts";
import { type Group, type GroupName, GROUPS } from "./table.ts";
import { Usages } from "./usage.ts";

const SERVICES = ["api", "conntrack", "conntrack-standby", "wake", "health", "restart", "lazy", "journal"] as const;

const Fields = v.object({
  /** An address of its own for `/metrics`, as `127.0.0.1:9464`; port 0 takes a free one. None when absent. */
  listen: v.optional(v.pipe(v.string(), v.check(isAddress, "expected an address such as 127.0.0.1:9464"))),
  /** The bearer token that this address asks for; any address but loopback needs one. The API asks for its own. */
  token: v.optional(v.pipe(
    v.string(),
    v.rawCheck(({ dataset, addIssue }) => {
      if (!dataset.typed || /^[\w.~+/-]{16,}=*$/.test(dataset.value)) return;
      // Told without what was found, for config errors end up in logs.
      addIssue({ message: "expected at least 16 characters of a bearer token (RFC 6750)", input: "(hidden)" });
    }),
  )),
  /** Instances that have their own series of CPU, memory and network, those created first; the others are summed. */
  instance_label_budget: v.optional(v.pipe(v.number(), v.integer(), v.minValue(0)), 200),
  /** What instances use is read at most this often, however many scrapes there are. */
  stats_max_age: v.optional(duration(), "5s"),
});
const Options = v.pipe(
  Fields,
  v.rawCheck(({ dataset, addIssue }) => {
    if (!dataset.typed) return;
    const { listen, token } = dataset.value;
    const address = listen === undefined ? undefined : parseListen(listen);
    if (address === undefined || token !== undefined || isLocal(address)) return;
    addIssue({
      message: "an address that is not loopback needs a token",
      input: listen,
      path: [{ type: "object", origin: "value", input: dataset.value, key: "listen", value: listen }],
    });
  }),
);
type Options = v.InferOutput<typeof Options>;

export default metricsPlugin(steadyClock);

/** The plugin on a clock that does not step; tests hand in one of their own. */
export function metricsPlugin(clock: Clock) {
  return definePlugin<Options>({
    name: "metrics",
    requires: ["hypervisor", ...SERVICES.map((service) => `${service}?` as const)],
    options: Options,
    setup: (host, options) => setUp(host, options, clock),
  });
}

function setUp(host: Host, options: Options, clock: Clock): void {
  const { log, signal } = host;
  const hypervisor = host.use("hypervisor");
  const api = host.find("api");
  if (!api && options.listen === undefined) {
    throw new DormouseError("config_invalid", "nobody could read them: set listen, or turn on [plugins.api]");
  }
  const groups = (Object.keys(GROUPS) as GroupName[]).filter((name) => isOn(host, GROUPS[name]));
  const meters = new Meters(groups);
  const usages = new Usages({
    hypervisor,
    clock,
    log,
    signal,
    budget: options.instance_label_budget,
    maxAge: options.stats_max_age,
    since: Date.now(),
    read: (result) => meters.count("dormouse_instance_reads_total", { result }),
  });
  host.defer(() => usages.close());
  const context = { host, hypervisor, meters, usages, clock };
  const collectors = groups.map((name): [GroupName, Collect] => [name, SOURCES[name](context)]);

  const scrape = async (): Promise<Response> => {
    await usages.refresh();
    for (const [group, collect] of collectors) {
      try {
        collect();
      } catch (error) {
        // The other groups are what tells why this one fails.
        log.error("Cannot read metrics of {group}: {reason}", { group, reason: messageOf(error), error });
        meters.clear(group);
        meters.count("dormouse_scrape_errors_total", { group });
      }
    }
    return new Response(await meters.text(), { headers: { "Content-Type": meters.contentType } });
  };

  api?.route({
    method: "GET",
    path: "/metrics",
    scope: "metrics:read",
    summary: "What the host does and what its instances use, for Prometheus",
    responses: {
      200: { description: "The metrics, in the text format 0.0.4", type: "text/plain", schema: v.string() },
    },
    handle: scrape,
  });
  if (options.listen === undefined) return;
  const address = parseListen(options.listen) as { hostname: string; port: number };
  host.hooks.guard("host:ready", async () => {
    const server = await listen(scrape, { ...address, token: options.token, log }).catch((error) => {
      throw new DormouseError("plugin_failed", `Cannot listen on "${options.listen}": ${messageOf(error)}`, {
        cause: error,
      });
    });
    host.defer(() => server.close());
    log.info("Metrics on {url}", { url: server.url });
  }, { priority: -100 });
}

function isOn(host: Host, { service }: Group): boolean {
  return service === undefined || host.find(service) !== undefined;
}

function isAddress(text: string): boolean {
  const address = parseListen(text);
  return address !== undefined && "port" in address;
}
