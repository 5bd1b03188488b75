/**
 * The plugin `health`: probes instances that have a `health_check`, and says how they are; what becomes of that is for
 * others to decide. `policy.ts` is the field; `watch.ts` decides when who is probed and what is told, `slots.ts` bounds
 * how many at a time; `probes.ts` and `http.ts` are the probes; `window.ts` makes a status of their results, without a
 * clock or a network of its own; `saver.ts` keeps the counts on disk; `status.ts` is what people see.
 *
 * A probe comes from a port of `plugins/shared/probe-ports.ts` (64000 to 64511): it keeps nobody awake and wakes nobody.
 */
import * as v from "valibot";
import { definePlugin, type Host, type Instance } from "../../main.ts";
import { type Clock, systemClock } from "../shared/clock.ts";
import { Reach } from "../shared/reach.ts";
import { about } from "../shared/schemas.ts";
import { HealthCheck, type Kept, normalise } from "./policy.ts";
import { probeWith } from "./probes.ts";
import { HealthStatus, present } from "./status.ts";
import { type Remembered, Watch } from "./watch.ts";

const Options = v.object({
  /** Probes at the same time; those that are due beyond it wait for a place, the longest waiting first. */
  max_concurrent: v.optional(v.pipe(v.number(), v.integer(), v.minValue(1)), 256),
});
type Options = v.InferOutput<typeof Options>;

export default healthPlugin(systemClock);

/** The plugin on a clock and on chance, from 0 to 1, for the delay of first probes; tests hand in their own. */
export function healthPlugin(clock: Clock, random: () => number = Math.random) {
  return definePlugin<Options>({
    name: "health",
    requires: ["store", "hypervisor", "network?"],
    provides: ["health"],
    options: Options,
    setup: (host, options) => setUp(host, options, { clock, random }),
  });
}

function setUp(host: Host, options: Options, parts: { clock: Clock; random: () => number }): void {
  const { hooks, log } = host;
  const hypervisor = host.use("hypervisor");
  const reach = new Reach(hypervisor, host.find("network"));
  const reaches = (instance: Instance) => reach.has(instance);
  const executes = (name: string) => hypervisor.drivers().find((driver) => driver.name === name)?.features.has("exec");
  const extension = hypervisor.extend<HealthCheck | Kept, Remembered>({
    field: "health_check",
    code: "invalid_health_check",
    schema: about("How it is found out whether it is well", HealthCheck),
    normalise: (policy, instance) => normalise(policy as HealthCheck, instance, { reaches, executes }),
    present: (instance) => ({ health_status: present(watch.stateOf(instance), watch.windowOf(instance.id)) }),
    presented: { health_status: HealthStatus },
  });
  host.defer(() => extension[Symbol.dispose]());
  const notes = hypervisor.declareNotes({ "health:changed": { help: "The health of an instance is another" } });
  host.defer(() => notes[Symbol.dispose]());

  const watch: Watch = new Watch({
    hypervisor,
    hooks,
    log,
    extension,
    policyOf: (instance) => extension.policy(instance) as Kept | undefined,
    store: host.use("store"),
    probe: probeWith(hypervisor, (instance) => reach.addressOf(instance)),
    maxConcurrent: options.max_concurrent,
    ...parts,
  });
  hooks.commit("instance:commit", (context) => watch.commit(context));
  host.defer(() => watch.close());
  hooks.on("instance:event", ({ instance_id }) => void watch.refresh(instance_id), {
    buffer: 4096,
    lagged: () => watch.relist(),
  });
  hooks.guard("wake:ready", ({ instance, signal }) => watch.ready(instance, signal));
  // Once the registry knows what runs, and before anybody is woken.
  hooks.guard("host:ready", () => watch.relist(), { priority: 20 });
  host.provide("health", { stateOf: (instance) => watch.stateOf(instance), stats: () => watch.stats() });
}
