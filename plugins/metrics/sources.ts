/** Where the numbers of each group come from: events that are counted as they happen, and what is read at a scrape. */
import { existsSync, readFileSync } from "node:fs";
import { type Host, type Hypervisor, type Instance, STATES } from "../../main.ts";
import type { Clock } from "../shared/clock.ts";
import { HEALTH, LAZY } from "../shared/features.ts";
import { watchLag } from "./lag.ts";
import type { Meters } from "./meters.ts";
import { Phases } from "./phases.ts";
import { measureProcess, runtime } from "./process.ts";
import type { GroupName } from "./table.ts";
import type { Usages } from "./usage.ts";

/** The label value of all that have none of their own. No name and no id looks like it. */
export const OTHER = "_other";
/** Events that may wait; they are counted at once, so only those of one turn of the loop do. */
const BUFFER = 16_384;
const METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"];
const TRACKED = "/proc/sys/net/netfilter/nf_conntrack";

export interface Context {
  host: Host;
  hypervisor: Hypervisor;
  meters: Meters;
  usages: Usages;
  clock: Clock;
}
/** Reads the numbers of now, in one go. */
export type Collect = () => void;

/** Begins to count what happens; returns what reads the rest. */
export const SOURCES: Record<GroupName, (context: Context) => Collect> = {
  host({ host, meters, clock }) {
    const lag = watchLag(clock, (seconds) => meters.observe("dormouse_event_loop_lag_seconds", {}, seconds));
    host.defer(() => lag[Symbol.dispose]());
    meters.set("dormouse_build_info", [[{ version: host.version, ...runtime() }, 1]]);
    return () => {
      meters.set("dormouse_plugin_up", [...host.plugins].map(([plugin, up]) => [{ plugin }, Number(up)]));
      measureProcess(meters);
    };
  },

  bus: ({ host, meters }) => () => {
    const all = host.hooks.stats();
    const each = (of: (stats: typeof all[number]) => number) =>
      all.map((stats) => [{ hook: stats.hook, consumer: stats.consumer }, of(stats)] as const);
    meters.set("dormouse_bus_subscribers", each((stats) => stats.subscribers));
    meters.set("dormouse_bus_queue_depth", each((stats) => stats.deepest));
    meters.set("dormouse_bus_dropped_total", each((stats) => stats.dropped));
    meters.set("dormouse_bus_handler_errors_total", each((stats) => stats.errors));
  },

  instances({ host: { hooks }, hypervisor, meters, clock }) {
    const phases = new Phases(clock.now);
    phases.read(hypervisor.list());
    hooks.on("instance:event", (event) => phases.take(event), { buffer: BUFFER });
    hooks.on("note:event", ({ type }) => meters.count("dormouse_notes_total", { type }), { buffer: BUFFER });
    hooks.on("action:done", ({ action, result, duration_ms, ...done }) => {
      // A creation that was refused names the driver that the client wrote.
      const driver = hypervisor.drivers().some(({ name }) => name === done.driver) ? done.driver : OTHER;
      meters.observe("dormouse_action_duration_seconds", { action, driver, result }, duration_ms / 1_000);
    }, { buffer: BUFFER });
    return () => {
      const cells = phases.read(hypervisor.list());
      const known = (of: string, wanted: string) =>
        cells.find(({ state, driver }) => driver === of && state === wanted);
      const drivers = new Set([...hypervisor.drivers().map(({ name }) => name), ...cells.map(({ driver }) => driver)]);
      const every = [...drivers].flatMap((driver) => STATES.map((state) => ({ driver, state })));
      const each = (of: (cell: ReturnType<typeof known>) => number) =>
        every.map((labels) => [labels, of(known(labels.driver, labels.state))] as const);
      meters.set("dormouse_instances", each((cell) => cell?.count ?? 0));
      meters.set("dormouse_instance_phase_seconds_total", each((cell) => (cell?.spent ?? 0) / 1_000));
    };
  },

  usage: ({ meters, usages }) => () => {
    const { labelled, others } = usages.view();
    const total = { instance: { name: OTHER, id: OTHER }, ...others };
    const rows = others.count > 0 ? [...labelled, total] : labelled;
    type Row = typeof rows[number];
    const each = (of: (row: Row) => number | null) =>
      rows.flatMap((row) => {
        const value = of(row);
        return value === null ? [] : [[{ name: row.instance.name, id: row.instance.id }, value] as const];
      });
    meters.set("dormouse_instance_cpu_seconds_total", each((row) => row.totals.cpu_seconds));
    meters.set("dormouse_instance_memory_bytes", each((row) => row.memory));
    meters.set("dormouse_instance_network_receive_bytes_total", each((row) => row.totals.network_rx_bytes));
    meters.set("dormouse_instance_network_transmit_bytes_total", each((row) => row.totals.network_tx_bytes));
    meters.put("dormouse_instances_unlabelled", others.count);
  },

  conntrack({ host, meters }) {
    const conntrack = host.use("conntrack");
    return () => {
      const { events, dropped, malformed, resyncs } = conntrack.stats();
      meters.put("dormouse_conntrack_up", Number(conntrack.error === null));
      meters.put("dormouse_conntrack_events_total", events);
      meters.put("dormouse_conntrack_dropped_total", dropped);
      meters.put("dormouse_conntrack_malformed_total", malformed);
      meters.put("dormouse_conntrack_resyncs_total", resyncs);
      meters.put("dormouse_conntrack_flows", numberIn(`${TRACKED}_count`));
      meters.put("dormouse_conntrack_flows_limit", numberIn(`${TRACKED}_max`));
    };
  },

  standby({ host, meters }) {
    const standby = host.use("conntrack-standby");
    const decided = ({ decision }: { decision: string }) =>
      meters.count("dormouse_standby_decisions_total", { decision });
    host.hooks.on("standby:decision", decided, { buffer: BUFFER });
    host.hooks.on("standby:flapping", () => meters.count("dormouse_standby_flapping_total", {}), { buffer: BUFFER });
    return () => {
      const { active, idle, flows, queued, in_flight } = standby.stats();
      meters.set("dormouse_standby_instances", byOne("status", { active, idle }));
      meters.set("dormouse_standby_attempts", byOne("phase", { queued, in_flight }));
      meters.put("dormouse_standby_active_flows", flows);
    };
  },

  wake({ host, meters }) {
    const wake = host.use("wake");
    host.hooks.on("wake:done", ({ cause, error, latency_ms }) => {
      const result = error === null ? "ok" : "failed";
      meters.observe("dormouse_wake_duration_seconds", { cause, result }, latency_ms / 1_000);
    }, { buffer: BUFFER });
    return () => {
      const { connections, refused, unknown_hosts, held, piped } = wake.stats();
      meters.put("dormouse_wake_connections_total", connections);
      meters.put("dormouse_wake_refused_total", refused);
      meters.put("dormouse_wake_unknown_hosts_total", unknown_hosts);
      meters.put("dormouse_wake_held_connections", held);
      meters.put("dormouse_wake_piped_connections", piped);
    };
  },

  health({ host, hypervisor, meters }) {
    const health = host.use("health");
    const changed = ({ to }: { to: string }) => meters.count("dormouse_health_changes_total", { status: to });
    host.hooks.on("health:changed", changed, { buffer: BUFFER });
    host.hooks.on("health:probed", ({ type, ok, duration_ms }) => {
      const result = ok ? "ok" : "failed";
      meters.observe("dormouse_health_probe_duration_seconds", { type, result }, duration_ms / 1_000);
    }, { buffer: BUFFER });
    return () => {
      const statuses = hypervisor.list().map((instance: Instance) => health.stateOf(instance));
      const count = (status: string) => statuses.filter((each) => each === status).length;
      meters.set("dormouse_health_instances", HEALTH.map((status) => [{ status }, count(status)]));
      const { running, waiting } = health.stats();
      meters.set("dormouse_health_probes", byOne("phase", { running, waiting }));
    };
  },

  restart({ host, meters }) {
    const restart = host.use("restart");
    const results: Record<string, string> = { done: "ok", failed: "failed", gave_up: "gave_up" };
    host.hooks.on("note:event", ({ type }) => {
      const [owner, step] = type.split(":");
      if (owner !== "restart") return;
      if (step === "scheduled") meters.count("dormouse_restarts_scheduled_total", {});
      else if (Object.hasOwn(results, step)) meters.count("dormouse_restarts_total", { result: results[step] });
    }, { buffer: BUFFER });
    return () => {
      const { waiting, blocked } = restart.stats();
      meters.put("dormouse_restart_waiting_instances", waiting);
      meters.set("dormouse_restart_blocked_instances", byOne("reason", blocked));
    };
  },

  lazy({ host, meters }) {
    const lazy = host.use("lazy");
    host.hooks.on("note:event", ({ type, detail: { latency_ms } }) => {
      const [, what, failed] = /^lazy_(start|stop)(_failed)?$/.exec(type) ?? [];
      const result = failed === undefined ? "ok" : "failed";
      if (what === "stop") meters.count("dormouse_lazy_stops_total", { result });
      if (what !== "start") return;
      meters.count("dormouse_lazy_starts_total", { result });
      if (result === "failed" || typeof latency_ms !== "number") return;
      meters.observe("dormouse_lazy_start_duration_seconds", {}, latency_ms / 1_000);
    }, { buffer: BUFFER });
    return () => {
      const { states, leases } = lazy.stats();
      meters.set("dormouse_lazy_instances", LAZY.map((state) => [{ state }, states[state]]));
      meters.put("dormouse_lazy_leases", leases);
    };
  },

  journal({ host, meters }) {
    const journal = host.use("journal");
    let seen = 0;
    const see = ({ seq }: { seq: number }) => void (seen = Math.max(seen, seq));
    host.hooks.on("instance:event", see, { buffer: BUFFER });
    host.hooks.on("note:event", see, { buffer: BUFFER });
    return () => {
      const { rows, pruned, streams, webhooks } = journal.stats();
      meters.put("dormouse_journal_rows", rows);
      meters.put("dormouse_journal_sequence", journal.last);
      meters.put("dormouse_journal_lag_rows", Math.max(0, seen - journal.last));
      meters.put("dormouse_journal_pruned_total", pruned);
      meters.put("dormouse_journal_streams", streams);
      const each = (of: (webhook: typeof webhooks[number]) => number) =>
        webhooks.map((webhook, i) => [{ webhook: String(i), host: hostOf(webhook.url) }, of(webhook)] as const);
      meters.set("dormouse_webhook_backlog", each(({ backlog }) => backlog));
      meters.set("dormouse_webhook_lag_seconds", each(({ lag_ms }) => lag_ms / 1_000));
      meters.set("dormouse_webhook_sent_total", each(({ sent }) => sent));
      meters.set("dormouse_webhook_failed_total", each(({ failed }) => failed));
      meters.set("dormouse_webhook_lost_total", each(({ lost }) => lost));
    };
  },

  http({ host, meters }) {
    host.hooks.on("api:request", ({ route, status, duration_ms, ...request }) => {
      // Anybody may send a method that nobody has heard of.
      const method = METHODS.includes(request.method) ? request.method : OTHER;
      meters.count("dormouse_http_requests_total", { route, method, code: String(status) });
      meters.observe("dormouse_http_request_duration_seconds", { route, method }, duration_ms / 1_000);
    }, { buffer: BUFFER });
    return () => {};
  },
};

function byOne<L extends string>(label: L, values: Readonly<Record<string, number>>) {
  return Object.entries(values).map(([key, value]) => [{ [label]: key } as Record<L, string>, value] as const);
}

function numberIn(path: string): number | null {
  return existsSync(path) ? Number(readFileSync(path, "latin1")) : null;
}

// Not the whole of it: those of many services have their secret in the path.
function hostOf(url: string): string {
  return URL.canParse(url) ? new URL(url).host : OTHER;
}
