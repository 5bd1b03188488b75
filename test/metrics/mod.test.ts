import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { test } from "node:test";
import { execa } from "execa";
import { DormouseError, type Instance, STATES } from "../../main.ts";
import { GROUPS, METRICS, type Spec } from "../../plugins/metrics/table.ts";
import { capturedLogs, lacking, startWith } from "../helpers.ts";
import { metricsPlugin } from "../../plugins/metrics/mod.ts";
import hypervisorPlugin from "../../plugins/hypervisor/mod.ts";
import storePlugin from "../../plugins/store.ts";
import { ManualClock } from "../clock.ts";
import { happenings, numbered, type Said } from "./features.ts";
import { promtool } from "./promtool.ts";
import { metricsWorld, of, ORIGIN } from "./world.ts";

const SPECS = Object.entries<Spec>(METRICS);
const FEATURES = ["conntrack", "standby", "wake", "health", "restart", "lazy", "journal"] as const;

/** The names of the metrics of a text, by type. */
const typesOf = (text: string) =>
  Object.fromEntries([...text.matchAll(/^# TYPE (\S+) (\S+)$/gm)].map(([, name, type]) => [name, type]));

test("METRICS follows the naming rules of Prometheus", () => {
  for (const [name, { type, help, labels }] of SPECS) {
    assert.match(name, /^(dormouse|process)(_[a-z]+)+$/, name);
    assert.equal(name.endsWith("_total"), type === "counter", `${name}: _total is for counters`);
    assert.doesNotMatch(name, /_(count|sum|bucket|info_total|ms|milliseconds|kilobytes|mb|minutes|percent)(_|$)/, name);
    assert.match(help, /^[A-Z][^\n]*[^.\n]$/, name);
    for (const label of labels) {
      assert.match(label, /^[a-z][a-z_]*$/, `${name}: ${label}`);
      // Those that Prometheus gives to what it scrapes, and those that it makes itself.
      assert.ok(!["instance", "job", "le", "quantile"].includes(label), `${name}: ${label}`);
    }
  }
  const grouped = Object.values(GROUPS).flatMap(({ metrics }) => Object.keys(metrics));
  assert.deepEqual(grouped, SPECS.map(([name]) => name), "each is in one group");
  for (const [name, spec] of SPECS) {
    if (spec.type !== "histogram") continue;
    const { bounds, why } = spec.buckets;
    assert.deepEqual(bounds, bounds.toSorted((a, b) => a - b), name);
    assert.ok(why.length > 20 && name.endsWith("_seconds"), name);
  }
});

test("GET /metrics answers in the text format, and lacks what belongs to plugins that are off", async (t) => {
  const { host, make, text } = await metricsWorld(t);
  await make("web");
  const response = await fetch(`${host.use("api").url}/metrics`);
  assert.equal(response.headers.get("Content-Type"), "text/plain; version=0.0.4; charset=utf-8");
  await response.body?.cancel();
  const types = typesOf(await text());
  for (const [group, { metrics }] of Object.entries(GROUPS)) {
    const off = (FEATURES as readonly string[]).includes(group);
    for (const [name, { type }] of Object.entries<Spec>(metrics)) {
      assert.equal(types[name], off ? undefined : type, name);
    }
  }
});

test("GET /metrics has every metric of the table when every plugin is on", async (t) => {
  const { host, make, text } = await metricsWorld(t, { plugins: [numbered()] });
  const [{ id }] = await make("web");
  happenings(host.hooks, host.use("hypervisor"), id);
  assert.deepEqual(typesOf(await text()), Object.fromEntries(SPECS.map(([name, { type }]) => [name, type])));
});

test("GET /metrics tells what the services say", async (t) => {
  const { make, scrape, host } = await metricsWorld(t, { plugins: [numbered()] });
  const [{ id }] = await make("web");
  happenings(host.hooks, host.use("hypervisor"), id);
  const series = await scrape();
  const expected = {
    dormouse_conntrack_up: 1,
    dormouse_conntrack_events_total: 1,
    dormouse_conntrack_dropped_total: 2,
    dormouse_conntrack_malformed_total: 3,
    dormouse_conntrack_resyncs_total: 4,
    'dormouse_standby_instances{status="active"}': 5,
    'dormouse_standby_instances{status="idle"}': 6,
    dormouse_standby_active_flows: 7,
    'dormouse_standby_attempts{phase="queued"}': 8,
    'dormouse_standby_attempts{phase="in_flight"}': 9,
    'dormouse_standby_decisions_total{decision="slept"}': 1,
    'dormouse_standby_decisions_total{decision="vetoed"}': 0,
    dormouse_standby_flapping_total: 1,
    dormouse_wake_connections_total: 12,
    dormouse_wake_refused_total: 13,
    dormouse_wake_unknown_hosts_total: 14,
    dormouse_wake_held_connections: 15,
    dormouse_wake_piped_connections: 16,
    'dormouse_wake_duration_seconds_count{cause="port",result="ok"}': 1,
    'dormouse_wake_duration_seconds_bucket{le="0.01",cause="port",result="ok"}': 1,
    'dormouse_wake_duration_seconds_bucket{le="0.005",cause="port",result="ok"}': 0,
    'dormouse_wake_duration_seconds_sum{cause="http",result="failed"}': 70,
    'dormouse_health_instances{status="healthy"}': 1,
    'dormouse_health_instances{status="unknown"}': 0,
    'dormouse_health_changes_total{status="unhealthy"}': 1,
    'dormouse_health_probe_duration_seconds_sum{type="tcp",result="failed"}': 2,
    'dormouse_health_probes{phase="running"}': 17,
    'dormouse_health_probes{phase="waiting"}': 18,
    dormouse_restart_waiting_instances: 19,
    'dormouse_restart_blocked_instances{reason="max_attempts_exceeded"}': 20,
    dormouse_restarts_scheduled_total: 1,
    'dormouse_restarts_total{result="ok"}': 1,
    'dormouse_restarts_total{result="failed"}': 1,
    'dormouse_restarts_total{result="gave_up"}': 1,
    'dormouse_lazy_instances{state="stopped"}': 21,
    'dormouse_lazy_instances{state="failed"}': 26,
    dormouse_lazy_leases: 27,
    'dormouse_lazy_starts_total{result="ok"}': 1,
    'dormouse_lazy_starts_total{result="failed"}': 1,
    'dormouse_lazy_stops_total{result="ok"}': 1,
    'dormouse_lazy_stops_total{result="failed"}': 1,
    dormouse_lazy_start_duration_seconds_count: 1,
    dormouse_lazy_start_duration_seconds_sum: 0.04,
    'dormouse_notes_total{type="lazy_stop"}': 1,
    dormouse_journal_sequence: 27,
    dormouse_journal_lag_rows: 0,
    dormouse_journal_rows: 28,
    dormouse_journal_pruned_total: 29,
    dormouse_journal_streams: 30,
    'dormouse_webhook_backlog{webhook="0",host="hooks.example"}': 31,
    'dormouse_webhook_backlog{webhook="1",host="hooks.example"}': 36,
    'dormouse_webhook_lag_seconds{webhook="0",host="hooks.example"}': 32,
    'dormouse_webhook_failed_total{webhook="0",host="hooks.example"}': 33,
    'dormouse_webhook_sent_total{webhook="0",host="hooks.example"}': 34,
    'dormouse_webhook_lost_total{webhook="0",host="hooks.example"}': 35,
  };
  for (const [name, value] of Object.entries(expected)) assert.equal(series[name], value, name);
});

test("GET /metrics never tells more of a webhook than its host", async (t) => {
  const { text } = await metricsWorld(t, { plugins: [numbered()] });
  assert.ok(!/secret|services/i.test(await text()));
});

test("GET /metrics counts instances by state and driver, and the time that they spend there", async (t) => {
  const { host, make, scrape, clock } = await metricsWorld(t);
  const hypervisor = host.use("hypervisor");
  const [a, b] = await make("a", "b", "c");
  await hypervisor.standby(a.id, ORIGIN);
  await clock.pass(10_000);
  let series = await scrape();
  const at = (metric: string, state: string) => series[`${metric}{driver="scripted",state="${state}"}`];
  const [COUNT, SECONDS] = ["dormouse_instances", "dormouse_instance_phase_seconds_total"];
  assert.deepEqual(Object.keys(of(series, COUNT)).length, STATES.length, "states that nobody is in are 0");
  assert.deepEqual([at(COUNT, "Running"), at(COUNT, "Standby"), at(COUNT, "Stopped")], [2, 1, 0]);
  assert.deepEqual([at(SECONDS, "Running"), at(SECONDS, "Standby"), at(SECONDS, "Stopped")], [20, 10, 0]);
  await hypervisor.stop(b.id, ORIGIN);
  await hypervisor.delete(a.id, ORIGIN);
  await clock.pass(5_000);
  await scrape();
  clock.step(-60_000);
  series = await scrape();
  assert.deepEqual([at(COUNT, "Running"), at(COUNT, "Standby"), at(COUNT, "Stopped")], [1, 0, 1]);
  assert.deepEqual([at(SECONDS, "Running"), at(SECONDS, "Standby"), at(SECONDS, "Stopped")], [25, 10, 5]);
});

test("GET /metrics tells how long actions take, by action, driver and result", async (t) => {
  const { host, make, scrape, driver } = await metricsWorld(t);
  const hypervisor = host.use("hypervisor");
  const [{ id }] = await make("web");
  driver.script.standby = () => {
    throw new Error("no room");
  };
  await assert.rejects(hypervisor.standby(id, ORIGIN));
  await assert.rejects(hypervisor.resume("nobody", ORIGIN));
  const series = of(await scrape(), "dormouse_action_duration_seconds_count");
  assert.equal(series['{action="create",driver="scripted",result="ok"}'], 1);
  assert.equal(series['{action="standby",driver="scripted",result="failed"}'], 1);
});

test("GET /metrics has no label value that a client could choose", async (t) => {
  const { host, scrape, text, driver } = await metricsWorld(t);
  const { url } = host.use("api");
  driver.script.validate = () => {
    throw new DormouseError("invalid_request", "Not this one");
  };
  const body = (hypervisor: string) => JSON.stringify({ name: "x", image: "any", hypervisor });
  for (const mark of ["zorro1", "zorro2"]) {
    const requests = [
      fetch(`${url}/${mark}`),
      fetch(`${url}/instances/${mark}`),
      fetch(`${url}/instances`, { method: mark.toUpperCase() }),
      fetch(`${url}/instances`, { method: "POST", headers: { "Content-Type": "application/json" }, body: body(mark) }),
      fetch(`${url}/instances`, {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: body("scripted"),
      }),
    ];
    for (const response of await Promise.all(requests)) await response.body?.cancel();
  }
  assert.ok(!/zorro/i.test(await text()));
  const requests = of(await scrape(), "dormouse_http_requests_total");
  assert.equal(requests['{route="/instances/:id",method="GET",code="404"}'], 2);
  assert.equal(requests['{route="none",method="GET",code="404"}'], 2);
});

test("GET /metrics escapes what label values hold", async (t) => {
  const { host, make, text } = await metricsWorld(t);
  const odd = 'a\\b"c\nd';
  host.hooks.publish("api:request", { method: "GET", route: odd, status: 200, duration_ms: 1 });
  await make("web");
  assert.ok((await text()).includes('dormouse_http_requests_total{route="a\\\\b\\"c\\nd",method="GET",code="200"} 1'));
});

test("GET /metrics tells of each consumer of the bus", async (t) => {
  const { host, make, scrape } = await metricsWorld(t);
  const { promise, resolve } = Promise.withResolvers<void>();
  capturedLogs(t);
  host.hooks.on("instance:event", () => promise, { consumer: "slow", buffer: 2 });
  host.hooks.on("instance:event", () => Promise.reject(new Error("never")), { consumer: "broken" });
  await make("a", "b", "c");
  const series = await scrape();
  const labels = '{hook="instance:event",consumer="slow"}';
  assert.equal(series[`dormouse_bus_subscribers${labels}`], 1);
  assert.ok(series[`dormouse_bus_queue_depth${labels}`] >= 2);
  assert.ok(series[`dormouse_bus_dropped_total${labels}`] >= 1);
  assert.ok(series['dormouse_bus_handler_errors_total{hook="instance:event",consumer="broken"}'] >= 3);
  assert.equal(series['dormouse_bus_dropped_total{hook="instance:event",consumer="metrics"}'], 0);
  resolve();
});

test("GET /metrics tells of the process, the build and the plugins", async (t) => {
  const { scrape } = await metricsWorld(t);
  const series = await scrape();
  const runtime = "Deno" in globalThis ? "deno" : "node";
  const [build] = Object.keys(of(series, "dormouse_build_info"));
  assert.match(
    build,
    new RegExp(`^{version="\\d+\\.\\d+\\.\\d+",runtime="${runtime}",runtime_version="\\d+\\.\\d+\\.\\d+"}$`),
  );
  assert.deepEqual(of(series, "dormouse_plugin_up"), {
    '{plugin="store"}': 1,
    '{plugin="hypervisor"}': 1,
    '{plugin="scripted"}': 1,
    '{plugin="api"}': 1,
    '{plugin="metrics"}': 1,
  });
  const { process_start_time_seconds: started, process_cpu_seconds_total: cpu } = series;
  assert.ok(started > Date.now() / 1_000 - 3_600 && started <= Date.now() / 1_000, `started ${started}`);
  assert.ok(cpu > 0 && cpu < 3_600, `cpu ${cpu}`);
  const { dormouse_heap_used_bytes: used, dormouse_heap_size_bytes: size, process_resident_memory_bytes: rss } = series;
  assert.ok(used > 1e6 && used <= size && rss > 1e7 && rss < 4e9, `heap ${used} of ${size}, resident ${rss}`);
  if (!existsSync("/proc/self/fd")) return;
  assert.ok(series.process_open_fds > 3 && series.process_open_fds < series.process_max_fds);
  assert.ok(series.process_virtual_memory_bytes > rss);
});

test("a group that cannot be read is left out, counted and logged, and the others are there", async (t) => {
  const said: Partial<Said> = { journal: () => Object.assign({ rows: 1, pruned: 2, streams: 3, webhooks: [] }) };
  const { scrape } = await metricsWorld(t, { plugins: [numbered({ journal: () => said.journal!() })] });
  const logs = capturedLogs(t);
  assert.equal((await scrape()).dormouse_journal_rows, 1);
  said.journal = () => {
    throw new Error("the database is closed");
  };
  const series = await scrape();
  assert.equal(series.dormouse_journal_rows, undefined);
  assert.equal(series.dormouse_journal_pruned_total, 2, "a total is not what it was before all");
  assert.equal(series.dormouse_lazy_leases, 27);
  assert.ok(logs.includes("error: Cannot read metrics of journal: the database is closed"), logs.join("\n"));
  assert.equal((await scrape())['dormouse_scrape_errors_total{group="journal"}'], 2);
});

test("GET /metrics asks for the scope metrics:read where the API has tokens", async (t) => {
  const tokens = [
    { name: "prometheus", token: "0123456789abcdef", scopes: ["metrics:read"] },
    { name: "other", token: "fedcba9876543210", scopes: ["instance:*"] },
  ];
  const { host } = await metricsWorld(t, { tables: { api: { listen: "127.0.0.1:0", access_log: false, tokens } } });
  const status = async (token?: string) => {
    const headers = token === undefined ? {} : { Authorization: `Bearer ${token}` };
    const response = await fetch(`${host.use("api").url}/metrics`, { headers: headers as Record<string, string> });
    await response.body?.cancel();
    return response.status;
  };
  assert.deepEqual([await status(), await status(tokens[1].token), await status(tokens[0].token)], [401, 403, 200]);
});

test("the metrics do not start where nobody could read them", async (t) => {
  const plugins = [storePlugin, hypervisorPlugin, metricsPlugin(new ManualClock())] as Parameters<typeof startWith>[1];
  await assert.rejects(startWith(t, plugins), (error: unknown) => {
    assert.ok(error instanceof DormouseError);
    assert.deepEqual([error.code, error.message], [
      "config_invalid",
      'Cannot set up plugin "metrics": nobody could read them: set listen, or turn on [plugins.api]',
    ]);
    return true;
  });
});

test("promtool has nothing to say against the metrics", { skip: lacking(await promtool()) }, async (t) => {
  const { host, make, text } = await metricsWorld(t, { plugins: [numbered()], table: { instance_label_budget: 1 } });
  const [{ id }] = await make("web", "other") as Instance[];
  happenings(host.hooks, host.use("hypervisor"), id);
  await text();
  const { stdout, stderr, exitCode } = await execa("promtool", ["check", "metrics"], {
    input: await text(),
    reject: false,
  });
  assert.deepEqual([exitCode, stdout, stderr], [0, "", ""]);
});
