import type { State } from "../../main.ts";

/** What can be asked of an instance that exists. */
export type Request =
  | "update"
  | "start"
  | "stop"
  | "pause"
  | "resume"
  | "standby"
  | "restore"
  | "fork"
  | "delete";

/** `go`: carry it out. `done`: it is as asked, so return it and emit nothing. `refuse`: 409 `invalid_state`. */
export type Rule = "go" | "done" | "refuse";

/** Total by construction: a new state or request does not compile until every cell is decided. */
export const RULES = {
  //         Created        Initializing          Running          Paused          Shutdown        Stopped          Standby          Unknown
  update: row("go", "go", "go", "go", "go", "go", "go", "go"),
  start: row("go", "done", "done", "refuse", "refuse", "go", "refuse", "refuse"),
  stop: row("go", "go", "go", "go", "go", "done", "go", "refuse"),
  pause: row("refuse", "refuse", "go", "done", "refuse", "refuse", "refuse", "refuse"),
  resume: row("refuse", "done", "done", "go", "refuse", "refuse", "refuse", "refuse"),
  standby: row("refuse", "refuse", "go", "refuse", "refuse", "refuse", "done", "refuse"),
  restore: row("refuse", "done", "done", "refuse", "refuse", "refuse", "go", "refuse"),
  fork: row("refuse", "refuse", "go", "refuse", "refuse", "go", "go", "refuse"),
  delete: row("go", "go", "go", "go", "go", "go", "go", "go"),
} satisfies Record<Request, Record<State, Rule>>;

/** What an instance shows while an action is under way; null where it shows no change until the end. */
export const UNDER_WAY = {
  update: null,
  start: "Created",
  stop: "Shutdown",
  pause: null,
  resume: null,
  standby: "Paused",
  restore: "Paused",
  fork: null,
  delete: "Shutdown",
} satisfies Record<Request, State | null>;

/** What an action leads to, for those who wait. */
export const OUTCOME = {
  update: null,
  start: "Running",
  stop: "Stopped",
  pause: "Paused",
  resume: "Running",
  standby: "Standby",
  restore: "Running",
  fork: null,
  delete: null,
} satisfies Record<Request, State | null>;

/** Requests that end an action which is under way, rather than wait for its end. */
export const OVERTAKES = {
  update: [],
  start: ["stop", "delete"],
  stop: [],
  pause: [],
  resume: [],
  standby: ["restore", "resume", "start", "stop", "delete"],
  restore: ["stop", "delete"],
  fork: [],
  delete: [],
} satisfies Record<Request, Request[]>;

/** States in which something runs that may end by itself, so that a reconcile has to look. */
export const LIVE: Record<State, boolean> = {
  Created: true,
  Initializing: true,
  Running: true,
  Paused: true,
  Shutdown: true,
  Stopped: false,
  Standby: false,
  Unknown: true,
};

/** States that do not change by themselves towards `Running`: a `wait` for another state ends there. */
export const TERMINAL: Record<State, boolean> = {
  Created: false,
  Initializing: false,
  Running: false,
  Paused: false,
  Shutdown: true,
  Stopped: true,
  Standby: true,
  Unknown: true,
};

function row(
  Created: Rule,
  Initializing: Rule,
  Running: Rule,
  Paused: Rule,
  Shutdown: Rule,
  Stopped: Rule,
  Standby: Rule,
  Unknown: Rule,
): Record<State, Rule> {
  return { Created, Initializing, Running, Paused, Shutdown, Stopped, Standby, Unknown };
}
