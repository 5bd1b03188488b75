import * as v from "valibot";
import { type Instance, STATES } from "../../main.ts";
import { formatSize } from "../shared/size.ts";
import type { Fields } from "./fields.ts";
import { phaseTotals } from "./records.ts";

const Time = v.pipe(v.string(), v.isoTimestamp());
const OptionalTime = v.nullable(Time);

const RESPONSE = {
  id: v.string(),
  name: v.string(),
  image: v.string(),
  hypervisor: v.pipe(v.string(), v.description("The driver that runs it")),
  state: v.picklist(STATES),
  state_error: v.nullable(v.string()),
  created_at: Time,
  started_at: OptionalTime,
  stopped_at: OptionalTime,
  expires_at: OptionalTime,
  entrypoint: v.array(v.string()),
  cmd: v.array(v.string()),
  env: v.record(v.string(), v.string()),
  working_dir: v.nullable(v.string()),
  run_as: v.nullable(v.string()),
  tags: v.record(v.string(), v.string()),
  vcpus: v.optional(v.number()),
  size: v.optional(v.string()),
  hotplug_size: v.optional(v.string()),
  overlay_size: v.optional(v.string()),
  platform: v.optional(v.string()),
  network: v.object({
    enabled: v.boolean(),
    name: v.string(),
    ip: v.nullable(v.string()),
    mac: v.nullable(v.string()),
    ip6: v.nullable(v.string()),
  }),
  has_snapshot: v.boolean(),
  exit_code: v.nullable(v.number()),
  exit_message: v.optional(v.string()),
  current_phase: v.string(),
  current_phase_since: Time,
  phase_durations_ms: v.pipe(
    v.record(v.string(), v.number()),
    v.description("Milliseconds spent in each state so far; together the instance's lifetime"),
  ),
};

/** Instances as the API shows them. */
export class Presenter {
  readonly #fields: Fields;
  readonly #now: () => number;
  /** The JSON of what does not change with time, up to the time spent in the current state; gone with its revision. */
  readonly #fixed = new WeakMap<Instance, string>();

  constructor(fields: Fields, now: () => number) {
    this.#fields = fields;
    this.#now = now;
  }

  schema(): v.GenericSchema {
    return v.pipe(v.object({ ...RESPONSE, ...this.#fields.presented() }), v.metadata({ ref: "Instance" }));
  }

  present(instance: Instance): Record<string, unknown> {
    return { ...fixed(instance), phase_durations_ms: this.#phases(instance), ...this.#fields.present(instance) };
  }

  presentJson(instance: Instance): string {
    let text = this.#fixed.get(instance);
    if (text === undefined) this.#fixed.set(instance, text = upToPhase(instance));
    const { since, totals } = instance.phases;
    // The only number that changes: no object is made for it, for a list of thousands has thousands of them.
    const spent = (totals[instance.state] ?? 0) + Math.max(0, this.#now() - since);
    const extra = this.#fields.present(instance);
    // Not by its keys: those whose value is undefined are not in the text.
    const more = extra ? JSON.stringify(extra) : "{}";
    return `${text}${spent}}${more === "{}" ? "}" : `,${more.slice(1)}`}`;
  }

  #phases(instance: Instance): Record<string, number> {
    const totals = phaseTotals(instance, this.#now());
    const phases: Record<string, number> = {};
    for (const state in totals) phases[state.toLowerCase()] = totals[state as keyof typeof totals]!;
    return phases;
  }
}

function upToPhase(instance: Instance): string {
  const { [instance.state]: _current, ...others } = instance.phases.totals;
  const phases = Object.entries(others).map(([state, ms]) => `"${state.toLowerCase()}":${ms},`).join("");
  const text = JSON.stringify(fixed(instance)).slice(0, -1);
  return `${text},"phase_durations_ms":{${phases}"${instance.state.toLowerCase()}":`;
}

function fixed(instance: Instance): Record<string, unknown> {
  const { id, name, image, state, state_error, entrypoint, cmd, env, working_dir, run_as, tags, hints } = instance;
  const { hotplug_size, overlay_size, platform } = hints;
  return {
    id,
    name,
    image,
    hypervisor: instance.driver,
    state,
    state_error,
    created_at: time(instance.created_at),
    started_at: time(instance.started_at),
    stopped_at: time(instance.stopped_at),
    expires_at: time(instance.expires_at),
    entrypoint,
    cmd,
    env,
    working_dir,
    run_as,
    tags,
    ...(instance.vcpus !== null && { vcpus: instance.vcpus }),
    ...(instance.memory_bytes !== null && { size: formatSize(instance.memory_bytes) }),
    ...(hotplug_size !== undefined && { hotplug_size }),
    ...(overlay_size !== undefined && { overlay_size }),
    ...(platform !== undefined && { platform }),
    network: { ...instance.network, name: "default" },
    has_snapshot: state === "Standby",
    exit_code: instance.exit_code,
    ...(instance.exit_message !== null && { exit_message: instance.exit_message }),
    current_phase: state.toLowerCase(),
    current_phase_since: time(instance.phases.since),
  };
}

function time(ms: number | null): string | null {
  return ms === null ? null : new Date(ms).toISOString();
}
