/**
 * Every error a person or a machine can see, in one table. `status` is the HTTP status of an answer that carries the
 * code, `null` for errors that end the start-up and so never reach a client. README.md lists the same codes; a test
 * proves that the two agree and that each code is raised somewhere.
 */
export const ERRORS = {
  // What a client can cause.
  invalid_request: { status: 400, summary: "The body, the query or a field has a wrong shape or value" },
  malformed_json: { status: 400, summary: "The body is not JSON" },
  invalid_name: { status: 400, summary: "A name is not 1 to 63 of a-z, 0-9 and inner hyphens" },
  invalid_size: { status: 400, summary: "A size is not a number of bytes such as 512MB or 2GB" },
  invalid_state_name: {
    status: 400,
    sent_as: "invalid_state",
    summary: "The state to wait for is not one that can be waited for; clients see `invalid_state`",
  },
  invalid_timeout: { status: 400, summary: "A timeout is not a positive duration" },
  invalid_ttl: { status: 400, summary: "A ttl is not a duration" },
  invalid_expires_at: { status: 400, summary: "expires_at is not a time in the future" },
  invalid_wake: { status: 400, summary: "The wake policy is wrong, or cannot work for this instance" },
  invalid_health_check: { status: 400, summary: "The health check is wrong, or cannot work for this instance" },
  invalid_auto_standby: { status: 400, summary: "The auto_standby policy has a wrong value" },
  invalid_restart_policy: { status: 400, summary: "The restart_policy has a wrong value" },
  invalid_lazy: { status: 400, summary: "The lazy policy has a wrong value, or its driver has no standby" },
  invalid_snapshot_policy: {
    status: 400,
    summary: "The snapshot_policy has a wrong value, or what it asks for cannot be done here",
  },
  invalid_snapshot_compression: {
    status: 400,
    summary: "The compression of one standby has a wrong value, or cannot be done here",
  },
  invalid_compression_delay: { status: 400, summary: "The compression_delay of one standby is not a duration" },
  invalid_image: { status: 400, summary: "The image's name is wrong, or its folder is not complete and sound" },
  feature_off: { status: 400, summary: "The field belongs to a plugin that is not turned on" },
  unknown_driver: { status: 400, summary: "No driver of that name is loaded" },
  unauthorized: { status: 401, summary: "The bearer token is missing or wrong" },
  forbidden: { status: 403, summary: "The token lacks the scope that the route needs" },
  not_found: { status: 404, summary: "No such instance, route or resource" },
  route_off: {
    status: 404,
    sent_as: "feature_off",
    summary: "The route belongs to a plugin that is not turned on; clients see `feature_off`",
  },
  image_not_found: { status: 404, summary: "No such image on this host" },
  log_not_found: { status: 404, summary: "The instance has no log of that source yet" },
  lease_not_found: { status: 404, summary: "The lease was released, has ended, or ended with a stop of its instance" },
  method_not_allowed: { status: 405, summary: "The path exists but not with that method" },
  ambiguous: { status: 409, summary: "An id prefix matches several instances" },
  name_conflict: { status: 409, summary: "Another instance has the name" },
  port_conflict: { status: 409, summary: "Another instance or program has the host port" },
  image_in_use: { status: 409, summary: "Instances are made of the image" },
  host_conflict: { status: 409, summary: "Another instance has the HTTP host" },
  invalid_state: { status: 409, summary: "The action is not allowed in the instance's state" },
  aborted: { status: 409, summary: "A later request overtook the action before it was complete" },
  vetoed: { status: 409, summary: "A guard refused the action; details carry its code and reason" },
  not_lazy: { status: 409, summary: "The instance is not lazy, so there are no leases of it" },
  lazy_start_failed: { status: 409, summary: "The instance did not stay up until it was ready" },
  instance_in_standby: { status: 409, summary: "A hold came too late: the instance sleeps, or is about to or to stop" },
  instance_expired: { status: 409, summary: "The instance is past its expiry and about to be deleted" },
  insufficient_resources: { status: 409, summary: "Addresses, memory or another resource is used up" },
  idempotency_conflict: { status: 409, summary: "The Idempotency-Key was used before with another body" },
  payload_too_large: { status: 413, summary: "The body is over 1 MiB" },
  unsupported_media_type: { status: 415, summary: "The body is not application/json" },
  rate_limited: { status: 429, summary: "Too many event and log streams are open" },
  not_supported: { status: 501, summary: "The instance's driver lacks the feature" },
  // What goes wrong on our side.
  driver_failed: { status: 500, summary: "The driver could not carry out the action; the message says why" },
  guard_failed: { status: 500, summary: "A guard broke or ran past its deadline, so the action was not begun" },
  internal_error: { status: 500, summary: "An error in Dormouse itself; the log has the request id" },
  shutting_down: { status: 503, summary: "The host is closing" },
  request_timeout: { status: 504, summary: "The request ran past the API's own time limit" },
  lazy_start_timeout: {
    status: 504,
    summary: "The instance was not ready within start_timeout; it is left to become so",
  },
  // What ends the start-up.
  config_invalid: { status: null, summary: "The config file, an override or a plugin's options are wrong" },
  plugin_unknown: {
    status: null,
    summary: "A plugin that the config turns on has no module, or one that does not load",
  },
  plugin_invalid: { status: null, summary: "The module's default export is not a plugin" },
  plugin_missing: { status: null, summary: "A required service is provided by no plugin that is turned on" },
  plugin_cycle: { status: null, summary: "Plugins require each other in a circle" },
  plugin_duplicate: { status: null, summary: "Two plugins provide the same service or have the same command" },
  plugin_failed: { status: null, summary: "A plugin's setup threw" },
  plugin_timeout: { status: null, summary: "A plugin's setup ran past its deadline" },
  store_locked: { status: null, summary: "Another host uses the data_dir" },
  store_newer: { status: null, summary: "The database was written by a newer version" },
  store_changed: { status: null, summary: "A migration that was applied has changed since" },
  subnet_overlap: { status: null, summary: "The subnet overlaps a route of this machine" },
  bridge_in_use: { status: null, summary: "The bridge belongs to another host or to something else" },
} as const satisfies Record<string, { status: number | null; sent_as?: string; summary: string }>;

/** A code of {@linkcode ERRORS}. */
export type ErrorCode = keyof typeof ERRORS;

/** An error with a code of {@linkcode ERRORS}: what the API answers with, and what start-up ends with. */
export class DormouseError extends Error {
  override readonly name = "DormouseError";
  readonly code: ErrorCode;
  /** More for a machine to read; it is sent to clients, so it holds no internals. */
  readonly details?: Record<string, unknown>;

  constructor(code: ErrorCode, message: string, options: { cause?: unknown; details?: Record<string, unknown> } = {}) {
    super(message, options.cause === undefined ? undefined : { cause: options.cause });
    this.code = code;
    if (options.details) this.details = options.details;
  }

  /** The HTTP status of an answer that carries this error; 500 for those that belong to start-up. */
  get status(): number {
    return ERRORS[this.code].status ?? 500;
  }

  /** The code in an answer, where the HTTP contract has one name for what are two errors here. */
  get sent(): string {
    const entry: { summary: string; sent_as?: string } = ERRORS[this.code];
    return entry.sent_as ?? this.code;
  }
}

/** Thrown by a guard to refuse an action; the client sees `code` and the message. */
export class Veto extends Error {
  override readonly name = "Veto";
  readonly code: string;
  constructor(code: string, reason: string) {
    super(reason);
    this.code = code;
  }
}

/** The message of anything thrown, for a log line or an error that wraps it. */
export function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

/** Errors of JavaScript itself: a mistake in the code that threw them, as a rule. */
const MISTAKES = [TypeError, ReferenceError, RangeError, SyntaxError];

/** A line of a stack that names a file, and no part of the runtime; and those of the host's own functions. */
const [FRAME, HOST] = [
  /^\s+at (?:.*\()?(?:file:\/\/)?\/.*:\d+:\d+\)?$/,
  new URL("../../main.ts", import.meta.url).pathname,
];

/** What ended the program, for a person: the code and the message, and the place of a mistake in the code. */
export function reportOf(error: unknown): unknown {
  if (!(error instanceof DormouseError)) return error;
  const { code, message, cause } = error;
  const stack = cause instanceof Error && MISTAKES.some((kind) => cause instanceof kind) ? cause.stack ?? "" : "";
  const place = stack.split("\n").find((line) => FRAME.test(line) && !line.includes(`${HOST}:`));
  return [`dormouse: ${code}`, message, ...place === undefined ? [] : [place]].join("\n");
}
