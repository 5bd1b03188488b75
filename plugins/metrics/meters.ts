import { Counter, Gauge, Histogram, Registry } from "prom-client";
import { type GroupName, GROUPS, type LabelsOf, type MetricName, type NameOf, type Spec } from "./table.ts";

/** A series of a metric: its labels and its value. */
export type Reading<N extends MetricName> = readonly [labels: LabelsOf<N>, value: number];

type Instrument = Counter | Gauge | Histogram;

/** The metrics of the table whose group is on, in a registry of their own. */
export class Meters {
  readonly #registry = new Registry();
  readonly #instruments = new Map<string, Instrument>();

  constructor(groups: readonly GroupName[]) {
    for (const group of groups) {
      for (const [name, spec] of Object.entries<Spec>(GROUPS[group].metrics)) {
        this.#instruments.set(name, instrumentOf(name, spec, this.#registry));
      }
    }
  }

  get contentType(): string {
    return this.#registry.contentType;
  }

  /** Sets the metric to exactly these series: what was there before and is not among them goes. */
  set<N extends NameOf<"counter" | "gauge">>(name: N, readings: Iterable<Reading<N>>): void {
    const instrument = this.#of(name) as Counter | Gauge;
    // Of a counter too: what is read here are totals that somebody else has counted.
    instrument.reset();
    for (const [labels, value] of readings) instrument.inc({ ...labels }, value);
  }

  /** The same for a metric without labels; null where there is no value. */
  put<N extends NameOf<"counter" | "gauge">>(name: N, value: number | null): void {
    const instrument = this.#of(name) as Counter | Gauge;
    instrument.reset();
    if (value === null) instrument.remove();
    else instrument.inc(value);
  }

  count<N extends NameOf<"counter">>(name: N, labels: LabelsOf<N>): void {
    (this.#of(name) as Counter).inc({ ...labels });
  }

  /** `seconds` as the buckets are. */
  observe<N extends NameOf<"histogram">>(name: N, labels: LabelsOf<N>, seconds: number): void {
    (this.#of(name) as Histogram).observe({ ...labels }, Math.max(0, seconds));
  }

  /** Takes out what the readings of a group have set: rather none than what was so once. Totals stay as they were. */
  clear(group: GroupName): void {
    for (const [name, { type, labels }] of Object.entries<Spec>(GROUPS[group].metrics)) {
      if (type === "gauge") labels.length > 0 ? this.#of(name).reset() : this.put(name as NameOf<"gauge">, null);
    }
  }

  /** The text of all, in the format of the registry's content type. */
  text(): Promise<string> {
    return this.#registry.metrics();
  }

  #of(name: string): Instrument {
    const instrument = this.#instruments.get(name);
    if (!instrument) throw new TypeError(`Cannot measure "${name}": its group is off`);
    return instrument;
  }
}

function instrumentOf(name: string, spec: Spec, registry: Registry): Instrument {
  const common = { name, help: spec.help, labelNames: spec.labels, registers: [registry] };
  if (spec.type === "gauge") return new Gauge(common);
  if (spec.type === "histogram") return new Histogram({ ...common, buckets: [...spec.buckets.bounds] });
  const counter = new Counter(common);
  for (const value of spec.zeros ?? []) counter.inc({ [spec.labels[0]]: value }, 0);
  return counter;
}
