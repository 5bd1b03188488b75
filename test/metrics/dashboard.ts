/** Writes the Grafana dashboard of `config/`: part of `deno task docs`; `dashboard.test.ts` proves that it is current. */
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { dashboard } from "../../plugins/metrics/dashboard.ts";
import { ROOT } from "../helpers.ts";

export const DASHBOARD = join(ROOT, "config", "grafana-dashboard.json");

if (import.meta.main) writeFileSync(DASHBOARD, dashboard());
