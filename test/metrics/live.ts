// Run by live.test.ts in a network of its own: the real main.ts with every plugin on, the real kernel.
import assert from "node:assert/strict";
import { once } from "node:events";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";
import { execa } from "execa";
import { stringify } from "smol-toml";
import { cleanup, freePort, lacking, runMain, RUNTIME, temporaryFolder, until } from "../helpers.ts";
import { open, talk } from "../wake/world.ts";
import { promtool } from "./promtool.ts";
import { of, seriesOf } from "./world.ts";

const GUEST = 8080;
const ECHO = join(import.meta.dirname!, "..", "e2e", "sleep-echo.ts");
const skip = lacking(await promtool());

test("the metrics tell of what every plugin does on a real machine", async (t) => {
  const folder = temporaryFolder(t);
  const [apiPort, port, published] = [await freePort(), await freePort(), await freePort()];
  const plugins = {
    store: {},
    network: { bridge: "dmmetrics0", subnet: "10.124.0.0/16" },
    hypervisor: {},
    process: { grace: "1s" },
    conntrack: {},
    "conntrack-standby": { min_awake: "0s" },
    wake: {},
    health: {},
    restart: {},
    lazy: {},
    journal: {},
    api: { listen: `127.0.0.1:${apiPort}` },
    metrics: { listen: `127.0.0.1:${port}`, stats_max_age: "0s" },
  };
  const config = join(folder, "config.toml");
  writeFileSync(config, stringify({ data_dir: "data", host: { log_level: "warning" }, plugins }));
  const child = runMain(t, ["--config", config]);
  let ended = "";
  void child.then(({ exitCode, stderr }) => ended = `The host has ended with ${exitCode}: ${stderr}`);
  const call = async (method: string, path: string, body?: unknown) => {
    const response = await fetch(`http://127.0.0.1:${apiPort}${path}`, {
      method,
      headers: { "content-type": "application/json", connection: "close" },
      ...(body !== undefined && { body: JSON.stringify(body) }),
    });
    const text = await response.text();
    assert.ok(response.ok, `${method} ${path}: ${response.status} ${text}`);
    return text && JSON.parse(text);
  };
  cleanup(t).defer(async () => {
    if (ended) return;
    for (const { id } of await call("GET", "/instances")) await call("DELETE", `/instances/${id}`);
    child.kill("SIGTERM");
    await child;
  });
  await until("the host answers", async () => {
    assert.equal(ended, "");
    return await fetch(`http://127.0.0.1:${apiPort}/health`).then(({ ok }) => ok, () => false);
  }, 180_000);
  const text = async () => await (await fetch(`http://127.0.0.1:${port}/metrics`)).text();
  const scrape = async () => seriesOf(await text());

  const { network } = await call("POST", "/instances", {
    name: "web",
    image: "host",
    cmd: [...RUNTIME, ECHO, String(GUEST)],
    auto_standby: { enabled: true, idle_timeout: "1s" },
    wake: { ports: [{ host_port: published, guest_port: GUEST }] },
    health_check: { type: "tcp", interval: "100ms", timeout: "100ms", start_period: "0s", tcp: { port: GUEST } },
  });
  const cmd = ["sh", "-c", "sleep 0.2; exit 1"];
  await call("POST", "/instances", {
    name: "crashes",
    image: "host",
    cmd,
    restart_policy: { policy: "always", backoff: "1ms", max_backoff: "1ms", max_attempts: 2 },
  });
  await call("POST", "/instances", { name: "lazy", image: "host", cmd: ["sleep", "1000"], lazy: { enabled: true } });
  await call("POST", "/instances/lazy/stop");
  await call("POST", "/instances/lazy/acquire", { ttl: "10m" });
  await until("it answers", async () => await talk(GUEST, "hello", network.ip) === "hello");
  const { state } = await call("GET", "/instances/web/wait?state=Standby&timeout=30s");
  assert.equal(state, "Standby");
  // Until then it is the plugin that put it there who brings it back, which is no wake.
  await until("its sleep is verified", async () => {
    return (await scrape())['dormouse_standby_attempts{phase="in_flight"}'] === 0;
  });
  const before = await scrape();
  // Connected until all is seen that it has to be awake for.
  const client = await open(t, published, "127.0.0.1");
  client.write("wake up");
  await once(client, "data");
  await until("the wake is counted", async () => {
    const woken = Object.entries(of(await scrape(), "dormouse_wake_duration_seconds_count"));
    return woken.some(([labels, count]) => labels.includes('result="ok"') && count >= 1);
  });
  await until("it is found healthy", async () => {
    return of(await scrape(), "dormouse_health_instances")['{status="healthy"}'] === 1;
  });
  client.destroy();
  await until("its restarts are over", async () => {
    return (await scrape())['dormouse_restarts_total{result="gave_up"}'] === 1;
  });
  const series = await scrape();
  const sum = (metric: string) => Object.values(of(series, metric)).reduce((all, value) => all + value, 0);

  assert.equal(of(before, "dormouse_instances")['{driver="process",state="Standby"}'], 1);
  assert.ok(Object.keys(of(before, "dormouse_instance_memory_bytes")).every((labels) => !labels.includes("web")));
  assert.ok(series['dormouse_standby_decisions_total{decision="slept"}'] >= 1);
  assert.ok(series['dormouse_action_duration_seconds_count{action="standby",driver="process",result="ok"}'] >= 1);
  assert.ok(series['dormouse_action_duration_seconds_count{action="restore",driver="process",result="ok"}'] >= 1);
  assert.equal(series.dormouse_conntrack_up, 1);
  for (
    const metric of [
      "dormouse_conntrack_events_total",
      "dormouse_conntrack_flows",
      "dormouse_conntrack_flows_limit",
      "dormouse_health_probe_duration_seconds_count",
      "dormouse_health_changes_total",
      "dormouse_http_requests_total",
      "dormouse_instance_cpu_seconds_total",
      "dormouse_instance_memory_bytes",
      "dormouse_instance_network_receive_bytes_total",
      "dormouse_instance_network_transmit_bytes_total",
      "dormouse_instance_phase_seconds_total",
      "dormouse_journal_rows",
      "dormouse_journal_sequence",
      "dormouse_notes_total",
      "dormouse_restarts_scheduled_total",
    ]
  ) assert.ok(sum(metric) > 0, `${metric} is 0`);
  assert.equal(series['dormouse_restarts_total{result="ok"}'], 2);
  assert.equal(series['dormouse_restart_blocked_instances{reason="max_attempts_exceeded"}'], 1);
  assert.equal(series['dormouse_lazy_starts_total{result="ok"}'], 1);
  assert.equal(series.dormouse_lazy_start_duration_seconds_count, 1);
  assert.equal(series.dormouse_lazy_leases, 1);
  assert.equal(series.dormouse_journal_lag_rows, 0);
  assert.deepEqual(of(series, "dormouse_scrape_errors_total"), {});

  if (skip) return;
  const { stdout, stderr } = await execa("promtool", ["check", "metrics"], { input: await text(), reject: false });
  assert.deepEqual([stdout, stderr], ["", ""]);
});
