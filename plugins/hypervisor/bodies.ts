import { createId } from "@paralleldrive/cuid2";
import * as v from "valibot";
import type { ErrorCode, Instance } from "../../main.ts";
import { DormouseError } from "../../main.ts";
import { formatDuration, parseDuration } from "../shared/duration.ts";
import { didYouMean } from "../shared/nearest.ts";
import { about, text } from "../shared/schemas.ts";
import { parseSize } from "../shared/size.ts";
import type { Fields } from "./fields.ts";
import { BLANK } from "./records.ts";

const Name = v.pipe(
  v.string(),
  v.regex(/^[a-z0-9]([a-z0-9-]*[a-z0-9])?$/, "use a-z, 0-9 and inner hyphens"),
  v.maxLength(63, "at most 63 characters"),
  v.description("Of its own among all instances"),
);
const Size = v.pipe(v.string(), v.check((text) => parseSize(text) !== undefined, 'expected a size such as "512MB"'));
const Environment = v.pipe(
  v.record(v.pipe(v.string(), v.regex(/^[^=\0]+$/, "expected a name without = or NUL")), text()),
  v.description("Variables of its program, from its next start on, and of commands by exec"),
);
const Tags = v.pipe(
  v.record(v.pipe(v.string(), v.minLength(1), v.maxLength(128)), v.pipe(v.string(), v.maxLength(256))),
  v.description("By which a list can be asked for it"),
);
const Ttl = v.pipe(
  v.string(),
  v.check((text) => (parseDuration(text) ?? -1) >= 0, 'expected a duration such as "1h"'),
  v.description('From now until it is deleted; "0s" for never'),
);
const ExpiresAt = v.pipe(
  v.string(),
  v.isoTimestamp("expected a time such as 2030-01-31T12:00:00Z"),
  v.description("When it is deleted"),
);
const Words = v.array(text());
const Kept = "For clients of the contract: kept, and of no effect";

const CREATE = {
  name: Name,
  image: about("What it is made of, as its driver names it", v.pipe(text(), v.minLength(1))),
  hypervisor: v.optional(about("Its driver; the config's default_driver when absent", v.string())),
  entrypoint: v.optional(about("The program, and the first of its arguments", Words)),
  cmd: v.optional(about("What follows the entrypoint, or the program itself", Words)),
  env: v.optional(Environment),
  working_dir: v.optional(about("Where the program begins", text())),
  run_as: v.optional(
    about(
      '"user" or "user:group", by name or number, where its driver has users of this computer',
      v.pipe(text(), v.minLength(1)),
    ),
  ),
  tags: v.optional(Tags),
  vcpus: v.optional(
    v.pipe(
      v.number(),
      v.integer(),
      v.minValue(1),
      v.maxValue(1024),
      v.description("Processors that it may use; as many as its driver gives it when absent"),
    ),
  ),
  size: v.optional(about('Its memory, such as "512MB"; as much as its driver gives it when absent', Size)),
  network: v.optional(about(
    "Whether it has an address of its own",
    v.strictObject({ enabled: v.optional(about("True when absent", v.boolean())) }),
  )),
  ttl: v.optional(Ttl),
  expires_at: v.optional(ExpiresAt),
  hotplug_size: v.optional(about(Kept, Size)),
  overlay_size: v.optional(about("Of a machine's disk, where that is to be larger than its image's", Size)),
  platform: v.optional(about(Kept, v.string())),
  skip_guest_agent: v.optional(about(Kept, v.boolean())),
  skip_kernel_headers: v.optional(about(Kept, v.boolean())),
};
const UPDATE = {
  env: v.optional(Environment),
  tags: v.optional(Tags),
  ttl: v.optional(Ttl),
  expires_at: v.optional(v.nullable(ExpiresAt)),
};
const FORK = {
  name: Name,
  from_running: v.optional(about("Whether a source that runs is put to standby for it, and woken", v.boolean())),
  target_state: v.optional(
    about(
      "What the copy is to be; when absent what its source is, and Standby of one that runs",
      v.picklist(["Stopped", "Standby", "Running"]),
    ),
  ),
};
const HINTS = ["hotplug_size", "overlay_size", "platform", "skip_guest_agent", "skip_kernel_headers"] as const;

/** Keys that Valibot leaves out of a record without a word, against prototype pollution: better refused than lost. */
const RESERVED = ["__proto__", "constructor", "prototype"];

/** Of the contract, but of nothing that Dormouse runs: refused by name rather than ignored, unless they are empty. */
const UNSUPPORTED = ["volumes", "devices", "gpu", "credentials", "disk_io_bps"];

const CODES: Record<string, ErrorCode> = {
  name: "invalid_name",
  size: "invalid_size",
  hotplug_size: "invalid_size",
  overlay_size: "invalid_size",
  ttl: "invalid_ttl",
  expires_at: "invalid_expires_at",
};

export type ForkBody = v.InferOutput<v.ObjectSchema<typeof FORK, undefined>>;
type CreateBody = v.InferOutput<v.ObjectSchema<typeof CREATE, undefined>>;
type UpdateBody = v.InferOutput<v.ObjectSchema<typeof UPDATE, undefined>>;

/** The bodies of create, update and fork: their schemas, with the fields of plugins, and what they make of instances. */
export class Bodies {
  readonly #fields: Fields;

  constructor(fields: Fields) {
    this.#fields = fields;
  }

  schemas() {
    const create = { ...CREATE, ...this.#fields.entries({ clearable: false }) };
    const update = { ...UPDATE, ...this.#fields.entries({ clearable: true }) };
    return {
      create: v.pipe(v.strictObject(create), v.metadata({ ref: "CreateInstanceRequest" })),
      update: v.pipe(v.strictObject(update), v.metadata({ ref: "UpdateInstanceRequest" })),
      fork: v.pipe(v.strictObject(FORK), v.metadata({ ref: "ForkInstanceRequest" })),
    };
  }

  /** A new instance, not stored yet. `now` is when the request came in: a ttl counts from there. */
  create(body: unknown, { now, defaultDriver }: { now: number; defaultDriver: string }): Instance {
    const checked = this.#check<CreateBody>(this.schemas().create, this.#supported(body));
    const { name, image, hypervisor: driver = defaultDriver, size, tags = {}, env = {} } = checked;
    const hints = Object.fromEntries(
      HINTS.flatMap((hint) => (checked[hint] === undefined ? [] : [[hint, checked[hint]]])),
    );
    const instance: Instance = {
      ...blank(now),
      name,
      image,
      driver,
      entrypoint: checked.entrypoint ?? [],
      cmd: checked.cmd ?? [],
      env,
      tags,
      working_dir: checked.working_dir ?? null,
      run_as: checked.run_as ?? null,
      vcpus: checked.vcpus ?? null,
      memory_bytes: size === undefined ? null : parseSize(size)!,
      hints,
      network: { enabled: checked.network?.enabled ?? true, ip: null, mac: null, ip6: null },
      expires_at: expiry(checked, now) ?? null,
    };
    return { ...instance, policies: this.#fields.policies(checked, instance) };
  }

  /** The fields that an update changes. @throws {DormouseError} `instance_expired` past the deadline */
  update(instance: Instance, body: unknown, { now }: { now: number }): Partial<Instance> {
    const checked = this.#check<UpdateBody>(this.schemas().update, this.#supported(body));
    const expires_at = expiry(checked, now);
    if (expires_at !== undefined && instance.expires_at !== null && instance.expires_at <= now) {
      const since = formatDuration(now - instance.expires_at);
      throw new DormouseError(
        "instance_expired",
        `Cannot update expiry of instance "${instance.name}": expired ${since} ago`,
      );
    }
    const { env, tags } = checked;
    const policies = this.#fields.policies(checked, instance);
    return { ...(env && { env }), ...(tags && { tags }), ...(expires_at !== undefined && { expires_at }), policies };
  }

  fork(body: unknown): ForkBody {
    return this.#check<ForkBody>(this.schemas().fork, body);
  }

  /** A new instance with what the source was asked to be: its own id, address and history, and no expiry. */
  forked(source: Instance, { name, now }: { name: string; now: number }): Instance {
    const { id, state, phases, revision } = blank(now);
    const network = { ...source.network, ip: null, mac: null, ip6: null };
    const fresh = { id, name, network, state, phases, revision, created_at: now, expires_at: null, state_error: null };
    const policies = this.#fields.forked(source);
    return { ...source, ...fresh, policies, started_at: null, stopped_at: null, exit_code: null, exit_message: null };
  }

  /** The body without the contract's fields that are empty and of no use here; those in use are refused by name. */
  #supported(body: unknown): unknown {
    if (!isObject(body) || Array.isArray(body)) return body;
    const fields: Record<string, unknown> = { ...body };
    this.#fields.refuseOff(fields);
    this.#fields.refuseArrays(fields);
    for (const field of ["env", "tags"]) refuseLost(field, fields[field]);
    for (const field of UNSUPPORTED) {
      const value = fields[field];
      if (isObject(value) ? Object.keys(value).length > 0 : Boolean(value)) {
        throw new DormouseError("not_supported", `Cannot use field "${field}": no driver of this host has it`);
      }
      delete fields[field];
    }
    return fields;
  }

  #check<T>(schema: v.GenericSchema, body: unknown): T {
    const result = v.safeParse(schema, body);
    if (result.success) return result.output as T;
    const issue = result.issues[0];
    const path = v.getDotPath(issue) ?? "body";
    const field = path.split(".")[0];
    const own = Object.hasOwn(CODES, field) ? CODES[field] : this.#fields.codeOf(field);
    // A field that there is not has no code of its own; one inside a field that there is has that field's.
    const code = own === undefined || (isUnknown(issue) && issue.path?.length === 1) ? "invalid_request" : own;
    throw new DormouseError(code, explain(issue, path, schema), { details: { field: cut(path) } });
  }
}

function isUnknown({ type, expected }: v.BaseIssue<unknown>): boolean {
  return type === "strict_object" && expected === "never";
}

function explain(issue: v.BaseIssue<unknown>, path: string, schema: v.GenericSchema): string {
  if (isUnknown(issue)) {
    const entries = (schema as unknown as { entries: Record<string, unknown> }).entries;
    return `Unknown field "${cut(path)}"${didYouMean(path, Object.keys(entries))}`;
  }
  if (issue.input === undefined) return `Missing field "${cut(path)}": expected ${issue.expected}`;
  const expected = issue.kind === "schema" && issue.expected ? `expected ${issue.expected}` : issue.message;
  return `Wrong value of "${cut(path)}": ${expected}, found ${cut(issue.received)}`;
}

/** Valibot takes an array for a record, and drops keys of {@linkcode RESERVED}. */
function refuseLost(field: string, value: unknown): void {
  if (!isObject(value)) return;
  const key = RESERVED.find((reserved) => Object.hasOwn(value, reserved));
  const why = Array.isArray(value) ? "expected an object, found an array" : key && `"${key}" is reserved`;
  if (why) throw new DormouseError("invalid_request", `Wrong value of "${field}": ${why}`, { details: { field } });
}

/** Of a name or value out of a body, which may be a megabyte, what a message can hold. */
function cut(text: string): string {
  return text.length > 200 ? `${text.slice(0, 200)}...` : text;
}

function isObject(value: unknown): value is object {
  return typeof value === "object" && value !== null;
}

/** Milliseconds since the epoch, null for never, undefined where the body says nothing. */
function expiry(body: { ttl?: string; expires_at?: string | null }, now: number): number | null | undefined {
  const { ttl, expires_at } = body;
  if (ttl !== undefined && expires_at !== undefined) {
    throw new DormouseError("invalid_request", 'Cannot use both "ttl" and "expires_at"');
  }
  if (ttl !== undefined) return parseDuration(ttl) === 0 ? null : now + parseDuration(ttl)!;
  if (expires_at === undefined || expires_at === null) return expires_at;
  const at = Date.parse(expires_at);
  if (at > now) return at;
  throw new DormouseError("invalid_expires_at", `Wrong value of "expires_at": ${expires_at} is not in the future`);
}

function blank(now: number): Instance {
  return { ...BLANK, id: createId(), created_at: now, phases: { since: now, totals: {} } };
}
