/**
 * The plugin `restart`: starts instances again that ended by themselves, or whose health check fails. `policy.ts` is the
 * field `restart_policy` and how long to wait; `ledger.ts` is what is kept of an instance and how each change of it
 * changes that; `supervisor.ts` makes the attempts, as many at a time as `places.ts` has places; `notes.ts` is what the
 * history is told.
 */
import * as v from "valibot";
import { definePlugin, type Host } from "../../main.ts";
import { type Clock, systemClock } from "../shared/clock.ts";
import { about, duration } from "../shared/schemas.ts";
import { type Ledger, Status, statusOf } from "./ledger.ts";
import { KINDS } from "./notes.ts";
import { Places } from "./places.ts";
import { normalise, RestartPolicy } from "./policy.ts";
import { Supervisor } from "./supervisor.ts";

const Options = v.object({
  /** Instances that are started again at the same time. */
  max_concurrent: v.optional(v.pipe(v.number(), v.integer(), v.minValue(1)), 16),
  /** A start that takes longer than this goes on, and counts among them no more. */
  slow_start: v.optional(duration({ min: 1 }), "2s"),
});
type Options = v.InferOutput<typeof Options>;

export default restartPlugin(systemClock, Math.random);

/** The plugin on a clock and with its luck; tests hand in their own. */
export function restartPlugin(clock: Clock, random: () => number) {
  return definePlugin<Options>({
    name: "restart",
    requires: ["hypervisor", "health?"],
    provides: ["restart"],
    options: Options,
    setup: (host, options) => setUp(host, options, { clock, random }),
  });
}

function setUp(host: Host, options: Options, { clock, random }: { clock: Clock; random: () => number }): void {
  const { hooks, log } = host;
  const [hypervisor, health] = [host.use("hypervisor"), host.find("health")];
  const extension = hypervisor.extend<RestartPolicy, Ledger>({
    field: "restart_policy",
    code: "invalid_restart_policy",
    schema: about("Whether it is started again when it has ended by itself", RestartPolicy),
    normalise: (policy) => normalise(policy, { health: health !== undefined }),
    present(_instance, policy, ledger) {
      const restart_status = policy && ledger && statusOf(ledger);
      return restart_status ? { restart_status } : {};
    },
    presented: { restart_status: v.optional(Status) },
  });
  host.defer(() => extension[Symbol.dispose]());
  const notes = hypervisor.declareNotes(KINDS);
  host.defer(() => notes[Symbol.dispose]());

  const places = new Places(clock, { count: options.max_concurrent, patience: options.slow_start });
  const supervisor = new Supervisor({ hypervisor, extension, health, places, clock, random, log });
  hooks.commit("instance:commit", (context) => supervisor.commit(context));
  hooks.guard("action:fulfilled", (request) => supervisor.fulfilled(request));
  hooks.guard("before:start", (context) => supervisor.admitStart(context), { priority: Number.MIN_SAFE_INTEGER });
  // Before those who prepare for the stop.
  hooks.guard("before:stop", (context) => supervisor.admitStop(context), { priority: Number.MAX_SAFE_INTEGER });
  const lagged = () => supervisor.relist();
  hooks.on("instance:event", (event) => supervisor.follow(event), { buffer: 4096, lagged });
  hooks.on("health:changed", ({ instance_id }) => supervisor.look(instance_id), { buffer: 4096, lagged });
  // Once the registry knows what runs, and the others what they have of it.
  hooks.guard("host:ready", () => supervisor.begin(), { priority: -100 });
  // Closed first, while the changes that the attempts under way still make are followed.
  host.defer(() => supervisor.close());
  host.provide("restart", { stats: () => supervisor.stats() });
}
