/** The Grafana dashboard in `config/`, made from the table: a row for each group, a panel for each metric. */
import { type Group, GROUPS, type HistogramSpec, type Spec } from "./table.ts";

const DATASOURCE = { type: "prometheus", uid: "${datasource}" };
const SELECTOR = '{job=~"$job", instance=~"$instance"}';
const QUANTILES = [0.5, 0.95, 0.99];
/** Of Grafana's 24 columns, and in its units of height. */
const PANEL = { width: 8, height: 7 };

interface Target {
  refId: string;
  expr: string;
  legendFormat: string;
}

/** The dashboard's JSON, ready to be imported. Its one input is the data source. */
export function dashboard(): string {
  const panels: unknown[] = [];
  let y = 0;
  for (const { title, metrics } of Object.values<Group>(GROUPS)) {
    panels.push({
      id: panels.length + 1,
      type: "row",
      title,
      collapsed: false,
      gridPos: { x: 0, y, w: 24, h: 1 },
      panels: [],
    });
    y++;
    const entries = Object.entries(metrics);
    const perLine = 24 / PANEL.width;
    for (const [i, [name, spec]] of entries.entries()) {
      const [column, line] = [i % perLine, Math.floor(i / perLine)];
      const gridPos = { x: column * PANEL.width, y: y + line * PANEL.height, w: PANEL.width, h: PANEL.height };
      panels.push({ id: panels.length + 1, ...panelOf(name, spec), gridPos });
    }
    y += Math.ceil(entries.length / perLine) * PANEL.height;
  }
  const whole = {
    uid: "dormouse",
    title: "Dormouse",
    description: "Made from the table of metrics by `deno task docs`; changes belong there",
    tags: ["dormouse"],
    schemaVersion: 39,
    editable: true,
    graphTooltip: 1,
    refresh: "30s",
    time: { from: "now-1h", to: "now" },
    templating: { list: [datasource(), variable("job", "job"), variable("instance", "instance", '{job=~"$job"}')] },
    panels,
  };
  return `${JSON.stringify(whole, null, 2)}\n`;
}

function panelOf(name: string, spec: Spec) {
  const { help, unit } = spec;
  const single = unit === "date" || unit === "info";
  return {
    type: single ? "stat" : "timeseries",
    title: name.replace(/^dormouse_/, "").replace(/_total$/, "").replaceAll("_", " "),
    description: spec.type === "histogram" ? `${help}. Buckets: ${spec.buckets.why}` : help,
    datasource: DATASOURCE,
    fieldConfig: { defaults: { unit: unitOf(name, spec), ...(spec.type !== "gauge" && { min: 0 }) }, overrides: [] },
    options: single
      ? { textMode: unit === "info" ? "name" : "value", reduceOptions: { calcs: ["lastNotNull"] } }
      : { legend: { displayMode: "list", placement: "bottom" }, tooltip: { mode: "multi", sort: "desc" } },
    targets: targetsOf(name, spec),
  };
}

/** The PromQL of a metric's panel: rates of counters, quantiles of histograms, gauges as they are. */
export function targetsOf(name: string, spec: Spec): Target[] {
  const { type, labels } = spec;
  if (type === "histogram") return quantiles(name, spec);
  const legendFormat = labels.map((label) => `{{${label}}}`).join(" ") || "{{instance}}";
  const by = labels.length > 0 ? labels.join(", ") : "instance";
  const each = type === "counter" ? `rate(${name}${SELECTOR}[$__rate_interval])` : `${name}${SELECTOR}`;
  const expr = spec.unit === "date" ? `max by (${by}) (${each}) * 1000` : `sum by (${by}) (${each})`;
  return [{ refId: "A", expr, legendFormat }];
}

// By the first label only: by all of them the curves are too many to be read.
function quantiles(name: string, { labels: [label] }: HistogramSpec): Target[] {
  const by = label === undefined ? "le" : `le, ${label}`;
  return QUANTILES.map((quantile, i) => ({
    refId: "ABC"[i],
    expr: `histogram_quantile(${quantile}, sum by (${by}) (rate(${name}_bucket${SELECTOR}[$__rate_interval])))`,
    legendFormat: `p${quantile * 100}${label === undefined ? "" : ` {{${label}}}`}`,
  }));
}

function unitOf(name: string, { type, unit }: Spec): string {
  if (unit === "date") return "dateTimeFromNow";
  if (unit === "share") return "percentunit";
  if (unit !== undefined) return "short";
  if (/_bytes(_total)?$/.test(name)) return type === "counter" ? "Bps" : "bytes";
  if (name.endsWith("_seconds")) return "s";
  return type === "counter" ? "cps" : "short";
}

function datasource() {
  return { name: "datasource", label: "Data source", type: "datasource", query: "prometheus", hide: 0 };
}

function variable(name: string, label: string, selector = "") {
  const query = `label_values(dormouse_build_info${selector}, ${label})`;
  return {
    name,
    label,
    type: "query",
    datasource: DATASOURCE,
    query: { query, refId: name },
    definition: query,
    refresh: 2,
    includeAll: true,
    multi: true,
    current: { text: "All", value: "$__all" },
    hide: 0,
  };
}
