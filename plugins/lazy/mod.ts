/**
 * The plugin `lazy`: instances that run only while work needs them. `policy.ts` is the field `lazy`; `leases.ts` and
 * `entry.ts` are what is known of one instance, without a clock of its own. `keeper.ts` decides who is needed: it grants
 * by `acquires.ts` (one `flight.ts` for all who wait, which `raise.ts` brings to its end) and stops by `stops.ts`.
 * `notes.ts` is what history has of it, `counts.ts` and `ledger.ts` the metrics; `routes.ts` is what people see.
 */
import * as v from "valibot";
import {
  definePlugin,
  type Extension,
  type Host,
  type Instance,
  type LazyState,
  type LifecycleEvent,
} from "../../main.ts";
import { type Clock, systemClock } from "../shared/clock.ts";
import { about, duration } from "../shared/schemas.ts";
import { metricsOf } from "./counts.ts";
import { readingOf, type Remembered } from "./entry.ts";
import { Keeper } from "./keeper.ts";
import { Ledger } from "./ledger.ts";
import { KINDS, Notes } from "./notes.ts";
import { LazyPolicy, normalise, termsOf } from "./policy.ts";
import { PRESENTED, routes } from "./routes.ts";

const Positive = v.pipe(v.number(), v.integer(), v.minValue(1));
const Options = v.object({
  /** How long a lease lasts that is asked for without a `ttl`. */
  default_ttl: v.optional(duration({ min: 1 }), "1m"),
  /** The longest `ttl` that can be asked for. */
  max_ttl: v.optional(duration({ min: 1 }), "24h"),
  /** Leases that one instance may have at the same time. */
  max_leases: v.optional(Positive, 256),
  /** Instances that are stopped at the same time. */
  max_concurrent: v.optional(Positive, 16),
  /** How soon a stop that has failed is tried again; failures in a row double it, up to 10m. */
  retry_backoff: v.optional(duration({ min: 100 }), "10s"),
});
type Options = v.InferOutput<typeof Options>;

/** After the guards that others decide by, before the one that takes the wake path over. */
const LATE = -60;

/** Of thousands of instances it may be all there is to say. */
const NOT_LAZY = { lifecycle_state: null, lifecycle_metrics: null };

export default lazyPlugin(systemClock);

/** The plugin on a clock; tests hand in one of their own. */
export function lazyPlugin(clock: Clock) {
  return definePlugin<Options>({
    name: "lazy",
    requires: ["store", "hypervisor", "api?", "journal?"],
    provides: ["lazy"],
    options: Options,
    setup: (host, options) => setUp(host, options, clock),
  });
}

function setUp(host: Host, options: Options, clock: Clock): void {
  const { hooks, log } = host;
  const [store, hypervisor, api] = [host.use("store"), host.use("hypervisor"), host.find("api")];
  const exists = (id: string) => hypervisor.find(id) !== undefined;
  const ledger = new Ledger({ store, journal: host.find("journal"), clock, log, exists });

  const extension: Extension<LazyPolicy, Remembered> = hypervisor.extend<LazyPolicy, Remembered>({
    field: "lazy",
    code: "invalid_lazy",
    schema: about("Whether it runs on demand: started by who acquires it, stopped when nobody has", LazyPolicy),
    normalise: (policy, instance) => normalise(policy, instance, hypervisor.drivers()),
    present: (instance) => present(instance),
    presented: PRESENTED,
  });
  host.defer(() => extension[Symbol.dispose]());
  const declared = hypervisor.declareNotes(KINDS);
  host.defer(() => declared[Symbol.dispose]());

  const notes = new Notes(hypervisor, ledger);
  const keeper = new Keeper({ hypervisor, hooks, store, extension, notes, clock, log }, {
    maxLeases: options.max_leases,
    maxConcurrent: options.max_concurrent,
    retryBackoff: options.retry_backoff,
  });
  const present = (instance: Instance): Record<string, unknown> => {
    const { id } = instance;
    if (!termsOf(extension.policy(instance))) return NOT_LAZY;
    return {
      lifecycle_state: readingOf(instance, keeper.find(id), clock.now()),
      lifecycle_metrics: metricsOf(ledger.of(id), extension.runtime(id)?.granted ?? 0),
    };
  };

  hooks.commit("note:commit", (note) => ledger.commit(note));
  hooks.commit("instance:commit", (context) => keeper.commit(context));
  hooks.guard("before:stop", (context) => keeper.guard(context, "stop"), { priority: LATE });
  hooks.guard("before:standby", (context) => keeper.guard(context, "standby"), { priority: LATE });
  // Closed before those above are undone: a stop that ends meanwhile is booked like any other.
  host.defer(() => ledger.close());
  host.defer(() => keeper.close());

  if (api) {
    const ttl = { defaultTtl: Math.min(options.default_ttl, options.max_ttl), maxTtl: options.max_ttl };
    routes(api, { hypervisor, keeper, present, ...ttl });
  }
  // Once the registry knows what runs.
  hooks.guard("host:ready", () => {
    ledger.rebuild();
    const take = (event: LifecycleEvent) => {
      keeper.take(event);
      if (event.to === null) ledger.forget(event.instance_id);
    };
    hooks.on("instance:event", take, { buffer: 4096, lagged: () => (keeper.relist(), ledger.prune()) });
    keeper.relist();
  }, { timeout: 60_000 });

  host.provide("lazy", {
    stats() {
      const states: Record<LazyState, number> = {
        stopped: 0,
        starting: 0,
        running: 0,
        idle: 0,
        stopping: 0,
        failed: 0,
      };
      let leases = 0;
      for (const entry of keeper.entries) {
        const instance = hypervisor.find(entry.id);
        if (!instance) continue;
        states[readingOf(instance, entry, clock.now())]++;
        leases += entry.leases.size;
      }
      return { states, leases };
    },
  });
}
