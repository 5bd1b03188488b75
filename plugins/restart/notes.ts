import type { NoteDraft, NoteKind, Origin } from "../../main.ts";
import { formatDuration } from "../shared/duration.ts";
import { ACTOR, type Ledger, UNHEALTHY } from "./ledger.ts";

export const KINDS: Record<string, NoteKind> = {
  "restart:scheduled": { help: "An instance ended by itself, or its health check fails: it is to be started again" },
  "restart:done": { help: "An instance was started again" },
  "restart:failed": { help: "An attempt to start an instance again did not work" },
  "restart:gave_up": { help: "An instance was started again so often in a row that it is not any more" },
};

/** What the history has not been told of a ledger; undefined where it knows all. */
export function untold(name: string, ledger: Ledger, now: number): NoteDraft | undefined {
  const { untold: type, reason, attempts, next_attempt_at } = ledger;
  if (type === null) return undefined;
  const wait = (next_attempt_at ?? now) - now;
  const summary = type === "restart:gave_up"
    ? `"${name}" is not restarted any more after ${attempts} attempts: ${explain(reason)}`
    : `"${name}" is restarted ${wait > 0 ? `in ${formatDuration(wait)}` : "now"}: ${explain(reason)}`;
  return { type, origin: originOf(ledger), summary, detail: { attempts, ...(wait > 0 && { next_attempt_at }) } };
}

export function done(name: string, origin: Origin, { attempts }: Ledger): NoteDraft {
  const summary = `Restarted "${name}": ${explain(origin.cause)}`;
  return { type: "restart:done", origin, summary, detail: { attempts } };
}

export function notDone(name: string, origin: Origin, { attempts }: Ledger, error: string): NoteDraft {
  const summary = `Restart of "${name}" failed: ${error}`;
  return { type: "restart:failed", origin, summary, detail: { attempts, error } };
}

/** Who restarts, and why. */
export function originOf({ reason }: Ledger): Origin {
  return { actor: ACTOR, cause: reason ?? "policy" };
}

/** A reason in words. */
function explain(reason: string | null): string {
  const [, code] = /^exit_code_(-?\d+)$/.exec(reason ?? "") ?? [];
  if (code !== undefined) return `it ended with exit code ${code}`;
  if (reason === "exit_unknown") return "it ended, and its exit code is not known";
  return reason === UNHEALTHY ? "its health check fails" : (reason ?? "").replaceAll("_", " ");
}
