import assert from "node:assert/strict";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";
import { execa } from "execa";
import { dashboard } from "../../plugins/metrics/dashboard.ts";
import { metricsTable } from "../../plugins/metrics/docs.ts";
import { GROUPS, METRICS, type Spec } from "../../plugins/metrics/table.ts";
import { lacking, temporaryFolder } from "../helpers.ts";
import { DASHBOARD } from "./dashboard.ts";
import { promtool } from "./promtool.ts";

interface Panel {
  id: number;
  type: string;
  title: string;
  gridPos: { x: number; y: number; w: number; h: number };
  datasource?: { uid: string };
  fieldConfig?: { defaults: { unit: string } };
  targets?: { expr: string; legendFormat: string }[];
}
const { panels, templating } = JSON.parse(dashboard()) as {
  panels: Panel[];
  templating: { list: { name: string; type: string }[] };
};
const shown = panels.filter(({ type }) => type !== "row");
const expressions = shown.flatMap(({ targets }) => targets!.map(({ expr }) => expr));

test("config/grafana-dashboard.json is current (deno task docs)", () => {
  assert.equal(readFileSync(DASHBOARD, "utf8"), dashboard());
});

test("dashboard() has a row for each group and a panel for each metric, none over another", () => {
  const rows = panels.filter(({ type }) => type === "row").map(({ title }) => title);
  assert.deepEqual(rows, Object.values(GROUPS).map(({ title }) => title));
  assert.equal(shown.length, Object.keys(METRICS).length);
  assert.equal(new Set(panels.map(({ id }) => id)).size, panels.length);
  const taken = new Set<string>();
  for (const { gridPos: { x, y, w, h }, title } of panels) {
    assert.ok(x + w <= 24, title);
    for (let i = x; i < x + w; i++) {
      for (let j = y; j < y + h; j++) {
        assert.ok(!taken.has(`${i} ${j}`), title);
        taken.add(`${i} ${j}`);
      }
    }
  }
});

test("dashboard() shows counters as rates, histograms as quantiles, and gauges as they are", () => {
  for (const [i, [name, { type }]] of Object.entries<Spec>(METRICS).entries()) {
    const targets = shown[i].targets!.map(({ expr }) => expr);
    const rate = `rate(${name}${type === "histogram" ? "_bucket" : ""}{`;
    for (const expr of targets) assert.equal(expr.includes(rate), type !== "gauge", expr);
    for (const expr of targets) assert.equal(expr.includes("histogram_quantile"), type === "histogram", expr);
    assert.ok(targets.every((expr) => expr.includes(name)), name);
  }
  const unitOf = (part: string) =>
    shown.find(({ targets }) => targets![0].expr.includes(part))!.fieldConfig!.defaults.unit;
  assert.equal(unitOf("dormouse_instance_memory_bytes"), "bytes");
  assert.equal(unitOf("dormouse_instance_network_receive_bytes_total"), "Bps");
  assert.equal(unitOf("dormouse_wake_duration_seconds"), "s");
  assert.equal(unitOf("dormouse_instance_cpu_seconds_total"), "percentunit");
  assert.equal(unitOf("dormouse_http_requests_total"), "cps");
});

test("dashboard() can be used with any data source, job and target", () => {
  assert.deepEqual(templating.list.map(({ name, type }) => `${name} ${type}`), [
    "datasource datasource",
    "job query",
    "instance query",
  ]);
  assert.ok(shown.every(({ datasource }) => datasource?.uid === "${datasource}"));
  assert.ok(expressions.every((expr) => expr.includes('{job=~"$job", instance=~"$instance"}')));
});

test("promtool understands every expression of the dashboard", { skip: lacking(await promtool()) }, async (t) => {
  const file = join(temporaryFolder(t), "rules.yml");
  const rules = expressions.map((expr, i) => {
    const text = expr.replaceAll("$__rate_interval", "1m").replaceAll("$job", "job").replaceAll(
      "$instance",
      "instance",
    );
    return `      - record: rule:${"abcdefghij"[i % 10]}${i}\n        expr: ${JSON.stringify(text)}`;
  });
  writeFileSync(file, ["groups:", "  - name: dashboard", "    rules:", ...rules, ""].join("\n"));
  const { exitCode, stdout, stderr } = await execa("promtool", ["check", "rules", file], { reject: false });
  assert.equal(exitCode, 0, `${stdout}\n${stderr}`);
  assert.match(stdout, new RegExp(`${expressions.length} rules found`));
});

test("metricsTable() has a line for each metric", () => {
  const lines = metricsTable().split("\n");
  assert.deepEqual(lines.slice(0, 2), ["| metric | type | labels | what |", "|---|---|---|---|"]);
  assert.deepEqual(lines.slice(2).map((line) => /^\| `(\w+)` \|/.exec(line)?.[1]), Object.keys(METRICS));
  for (const line of lines) assert.equal(line.replaceAll("\\|", "").split("|").length, 6, line);
});
