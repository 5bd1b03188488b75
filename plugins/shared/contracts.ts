/**
 * The details of the contracts in `main.ts`: what drivers, field owners and routes are handed and hand back. `main.ts`
 * exports them all again, so a plugin imports them from there.
 */
import type * as v from "valibot";
import type { Instance, Origin, State } from "../../main.ts";
import type { Lagged } from "./delivery.ts";
import type { ErrorCode } from "./errors.ts";

export type MaybePromise<T> = T | Promise<T>;

/** Any Standard Schema (https://standardschema.dev): Valibot's serve, and those of other libraries. */
export interface Schema<T = unknown> {
  readonly "~standard": {
    readonly version: 1;
    readonly vendor: string;
    readonly validate: (value: unknown) => MaybePromise<SchemaResult<T>>;
    readonly types?: { readonly input: unknown; readonly output: T } | undefined;
  };
}
type SchemaResult<T> = { readonly value: T; readonly issues?: undefined } | { readonly issues: readonly SchemaIssue[] };
export interface SchemaIssue {
  readonly message: string;
  readonly path?: readonly (PropertyKey | { readonly key: PropertyKey })[] | undefined;
}

// What the hook bus takes and gives.

export interface GuardOptions {
  /** Higher runs first; 0 when absent. */
  priority?: number;
  /** Milliseconds; `[host] guard_timeout` when absent. */
  timeout?: number;
}
export interface EventOptions {
  /** The name its statistics are kept under; the plugin's name when absent. */
  consumer?: string;
  /** Events that may wait for it; `[host] event_buffer` when absent. */
  buffer?: number;
  /** Called in the place of what did not fit, so that it can resync. When absent, a gap is logged as a warning. */
  lagged?: (gap: Lagged) => MaybePromise<void>;
}
export interface ConsumerStats {
  hook: string;
  consumer: string;
  subscribers: number;
  /** Events waiting in the fullest queue now. */
  deepest: number;
  dropped: number;
  errors: number;
}

// What drivers take and give.

/** What a driver gives an instance whose body does not say. */
export interface Size {
  vcpus: number;
  memory_bytes: number;
}
export interface ExecRequest {
  command: string[];
  working_dir?: string;
  env?: Record<string, string>;
  timeout_ms: number;
  /** Bytes kept of stdout and of stderr each; what is beyond is dropped and `truncated` set. */
  max_output: number;
  signal?: AbortSignal;
}
export interface ExecResult {
  exit_code: number;
  stdout: string;
  stderr: string;
  timed_out: boolean;
  truncated: boolean;
}
export interface Stats {
  cpu_seconds: number;
  memory_rss_bytes: number;
  memory_vms_bytes: number;
  network_rx_bytes: number;
  network_tx_bytes: number;
}
export interface PathInfo {
  exists: boolean;
  is_dir: boolean;
  is_file: boolean;
  is_symlink: boolean;
  link_target: string | null;
  mode: number;
  size: number;
}
export interface LogRequest {
  source: "app" | "vmm" | "hypeman";
  tail: number;
  follow: boolean;
  signal: AbortSignal;
}

// What the registry takes and gives.

/** A per-instance policy field that a plugin owns. `P` is the policy, `R` what the plugin remembers about it. */
export interface FieldExtension<P, R> {
  field: string;
  /** The code of an error in the field; `invalid_request` when absent. */
  code?: ErrorCode;
  /** Of the field in create and update bodies; `null` in an update clears the policy. */
  schema: v.GenericSchema<unknown, P>;
  /** Checks across fields and stores what it returns; `undefined` stores no policy. @throws {DormouseError} */
  normalise?: (policy: P, instance: Instance) => P | undefined;
  /** What a fork gets of its source's policy; the same when absent, none where it returns `undefined`. */
  forked?: (policy: P) => P | undefined;
  /** More keys of the instance's response, such as a status; called for each response. */
  present?: (instance: Instance, policy: P | undefined, runtime: R | undefined) => Record<string, unknown>;
  /** The schemas of those keys, for the OpenAPI document. */
  presented?: Record<string, v.GenericSchema>;
}
export interface Extension<P, R> extends Disposable {
  policy(instance: Instance): P | undefined;
  runtime(id: string): R | undefined;
  /** Durable when it returns; forgotten with the instance, and never written for one that is gone. */
  save(id: string, runtime: R | undefined): void;
}

export interface InstanceFilter {
  state?: State;
  tags?: Record<string, string>;
}
export interface WaitResult {
  state: State;
  state_error: string | null;
  timed_out: boolean;
}

/** What is to become of what one standby keeps, in the place of what the field `snapshot_policy` says. */
export interface StandbyRequest {
  compression?: { enabled: boolean; algorithm?: string; level?: number };
  /** As Go has it. */
  compression_delay?: string;
}

// What the API takes and gives.

/** One HTTP request, after authentication and validation. */
export interface ApiCall {
  readonly id: string;
  readonly params: Readonly<Record<string, string>>;
  readonly query: Readonly<Record<string, unknown>>;
  readonly body: unknown;
  readonly headers: Headers;
  /** Aborts when the client leaves or the host closes. */
  readonly signal: AbortSignal;
  readonly origin: Origin;
}
export interface ApiRoute {
  method: "GET" | "POST" | "PUT" | "PATCH" | "DELETE";
  /** As `/instances/:id/wait`. */
  path: string;
  /** As `instance:read`; `public` needs no token. A route without a scope does not start. */
  scope: string;
  summary: string;
  query?: v.GenericSchema;
  /** A function where it is complete only once every plugin is set up. */
  body?: v.GenericSchema | (() => v.GenericSchema);
  bodyOptional?: boolean;
  /** The handler checks the body itself, to answer with codes of its own; then the schema is for the document only. */
  bodyChecked?: boolean;
  /** The code for a wrong value of a field of the body or the query; `invalid_request` for those that are not here. */
  codes?: Readonly<Record<string, ErrorCode>>;
  responses: Record<number, {
    description: string;
    schema?: v.GenericSchema | (() => v.GenericSchema);
    type?: string;
    /** For other content types that a client can ask for, by type. */
    also?: Readonly<Record<string, v.GenericSchema | (() => v.GenericSchema)>>;
  }>;
  /** Exempt from the request timeout: streams and long polls, which end by themselves when `signal` aborts. */
  long?: boolean;
  handle(call: ApiCall): MaybePromise<Response | { status: number; body?: unknown }>;
}

// What conntrack tells.

/** A connection as the kernel tracks it, seen from the side that opened it. */
export interface Flow {
  readonly protocol: "tcp" | "udp";
  readonly source: string;
  readonly source_port: number;
  /** Where it really goes: behind a destination NAT that is the instance, not the address that was dialled. */
  readonly destination: string;
  readonly destination_port: number;
  /**
   * The kernel's name, `ESTABLISHED`; `UNKNOWN_12` for one that has no name here. Empty for UDP, for flows that were handed
   * to hardware, and in updates about something else, such as the mark, which leave the state as it was.
   */
  readonly state: string;
}
export type FlowKind = "new" | "update" | "destroy";

/** The kernel's connection table, as a service for those who act on traffic. */
export interface Conntrack {
  /** How it is read: `netlink`, or the `conntrack` program. */
  readonly mode: "netlink" | "program";
  /** Why events may be missing now, or null while it listens. */
  readonly error: string | null;
  /** Calls `listener` for each event of a flow to this address, IPv4 or IPv6, in order. Constant time per event. */
  watch(address: string, listener: (kind: FlowKind, flow: Flow) => void): Disposable;
  /** `lost` when events may be missing from here on, `connected` when they come again: the moment to dump. */
  follow(listener: { lost(reason: string): void; connected(): void }): Disposable;
  /** Every flow to a watched address, or to those given. @throws where the kernel does not answer */
  dump(addresses?: ReadonlySet<string>): Promise<Flow[]>;
  stats(): { events: number; dropped: number; malformed: number; resyncs: number };
}
