/**
 * The plugin `conntrack-standby`: puts instances to standby that nobody is connected to. `policy.ts` is the field
 * `auto_standby`; `tracker.ts` with `active.ts` (flows) and `flap.ts` says of one instance when it may sleep, without a
 * clock or a kernel of its own; `controller.ts` feeds the trackers from `instance:event` and conntrack, `sight.ts` knows
 * whether events may be missing, `dumps.ts` reads the whole table; `attempts.ts` is the way to sleep and back;
 * `saver.ts` keeps countdowns and holds on disk; `status.ts` and `routes.ts` are what people see.
 *
 * What counts is a connection to the instance. Those that the host itself opens to probe it do not: they come from the
 * bridge's address with a source port of `plugins/shared/probe-ports.ts` (64000 to 64511).
 */
import * as v from "valibot";
import { definePlugin, type Host, type NoteDraft, type StandbyFlapping } from "../../main.ts";
import { formatDuration } from "../shared/duration.ts";
import { messageOf } from "../shared/errors.ts";
import { isProbe } from "../shared/probe-ports.ts";
import { about, duration } from "../shared/schemas.ts";
import { ACTOR } from "./attempts.ts";
import { type Clock, systemClock } from "../shared/clock.ts";
import { Controller } from "./controller.ts";
import type { Decide } from "./decisions.ts";
import { AutoStandby, normalise } from "./policy.ts";
import { routes } from "./routes.ts";
import type { Remembered } from "./tracker.ts";

const Options = v.object({
  /** Instances that are put to sleep at the same time. */
  max_concurrent: v.optional(v.pipe(v.number(), v.integer(), v.minValue(1)), 16),
  /** How long an instance stays awake after every start, wake and restore, whoever asked for it; 0s for no such time. */
  min_awake: v.optional(duration(), "5s"),
  /** A connection that is never answered counts for this long. */
  half_open_max_age: v.optional(duration({ min: 1 }), "120s"),
  /** Whether UDP flows count too. */
  count_udp: v.optional(v.boolean(), false),
  /** While anything is connected, the kernel's table is read this often for ends that no event has told of. */
  reconcile_interval: v.optional(duration({ min: 100 }), "2s"),
  /** All instances and the whole table are read this often. */
  full_sync: v.optional(duration({ min: 1_000 }), "5m"),
  /** How soon a sleep that a guard has refused, or that has failed, is tried again; failures in a row double it. */
  retry_backoff: v.optional(duration({ min: 100 }), "10s"),
  /** So many automatic sleeps and wakes within `flap_window` are too many; 0 never are. */
  flap_cycles: v.optional(v.pipe(v.number(), v.integer(), v.minValue(0)), 10),
  flap_window: v.optional(duration({ min: 1_000 }), "10m"),
  /** How long an instance that flaps stays awake; doubled with each further wake, up to `flap_backoff_max`. */
  flap_backoff: v.optional(duration({ min: 1 }), "1m"),
  flap_backoff_max: v.optional(duration({ min: 1 }), "30m"),
});
type Options = v.InferOutput<typeof Options>;

export default standbyPlugin(systemClock);

/** The plugin on a clock; tests hand in one of their own. */
export function standbyPlugin(clock: Clock) {
  return definePlugin<Options>({
    name: "conntrack-standby",
    requires: ["store", "hypervisor", "conntrack", "api?", "network?"],
    provides: ["conntrack-standby"],
    options: Options,
    setup: (host, options) => setUp(host, options, clock),
  });
}

function setUp(host: Host, options: Options, clock: Clock): void {
  const { hooks, log } = host;
  const [hypervisor, network, api] = [host.use("hypervisor"), host.find("network"), host.find("api")];
  const extension = hypervisor.extend<AutoStandby, Remembered>({
    field: "auto_standby",
    code: "invalid_auto_standby",
    schema: about("Whether it sleeps by itself, and when", AutoStandby),
    normalise,
  });
  host.defer(() => extension[Symbol.dispose]());
  const notes = hypervisor.declareNotes({
    "standby:decision": { help: "A step of an instance's way to sleep by itself, or what kept it from going" },
    "standby:flapping": { help: "An instance sleeps and wakes too often, and is left awake for a while" },
  });
  host.defer(() => notes[Symbol.dispose]());

  // What cannot be written, on a full disk, must not change what is decided.
  const tell = (id: string, draft: NoteDraft) => {
    try {
      hypervisor.note(id, draft);
    } catch (error) {
      const { type } = draft;
      log.error("Noting {type} of instance {id} failed: {reason}", { type, id, reason: messageOf(error), error });
    }
  };
  const decide: Decide = ({ id, instance }, decision, reason, detail = {}) => {
    log.debug("Auto-standby of {id}: {decision}, {reason}", { id, decision, reason });
    const { name: instance_name } = instance;
    tell(id, {
      type: "standby:decision",
      origin: { actor: ACTOR, cause: reason },
      summary: `Auto-standby of "${instance_name}": ${decision} (${reason})`,
      detail: { ...detail, decision, reason },
    });
    hooks.publish("standby:decision", { instance_id: id, instance_name, at: clock.now(), decision, reason, detail });
  };
  const flapping = (event: StandbyFlapping) => {
    const [name, time] = [event.instance_name, formatDuration(event.awake_for)];
    log.warn("Instance {name} sleeps and wakes too often, it stays awake for {time}", { name, time });
    tell(event.instance_id, {
      type: "standby:flapping",
      origin: { actor: ACTOR, cause: "flapping" },
      summary: `"${name}" sleeps and wakes too often, it stays awake for ${time}`,
      detail: { cycles: event.cycles, awake_for: time },
    });
    hooks.publish("standby:flapping", event);
  };
  const gateways = [network?.gateway, network?.gateway6];
  const parts = { conntrack: host.use("conntrack"), hypervisor, store: host.use("store"), extension, clock, log };
  const controller = new Controller({ ...parts, decide, flapping }, {
    maxConcurrent: options.max_concurrent,
    minAwake: options.min_awake,
    halfOpenMaxAge: options.half_open_max_age,
    reconcileInterval: options.reconcile_interval,
    fullSync: options.full_sync,
    retryBackoff: options.retry_backoff,
    filter: { countUdp: options.count_udp, probe: (flow) => isProbe(flow, ...gateways) },
    flap: {
      cycles: options.flap_cycles,
      window: options.flap_window,
      backoff: options.flap_backoff,
      backoffMax: options.flap_backoff_max,
    },
  });

  // A standby that somebody asks for shows in no state while the guards think about it.
  const asked = new Set<string>();
  hooks.guard("before:standby", ({ instance: { id }, origin, signal }) => {
    if (origin.actor === ACTOR) return;
    asked.add(id);
    signal.addEventListener("abort", () => asked.delete(id), { once: true });
  }, { priority: Number.MAX_SAFE_INTEGER });
  hooks.on("instance:event", ({ instance_id }) => void asked.delete(instance_id), {
    consumer: "asked-standbys",
    lagged: () => asked.clear(),
  });
  host.provide("conntrack-standby", { stats: () => controller.stats() });
  if (api) routes(api, { hypervisor, controller, clock, asked, policyOf: extension.policy });
  // After the guards that others decide by, before the one that takes the wake path over.
  hooks.guard(
    "before:standby",
    (context) => controller.attempts.guard(controller.find(context.instance.id), context),
    { priority: -50 },
  );
  // Once the registry knows what runs.
  hooks.guard("host:ready", async () => {
    if (!host.plugins.has("wake")) log.warn("Instances go to sleep and no plugin wakes them: [plugins.wake] is off");
    hooks.on("instance:event", (event) => controller.take(event), {
      buffer: 4096,
      lagged: () => controller.relist(),
    });
    host.defer(() => controller.close());
    await controller.start();
  }, { timeout: 60_000 });
}
