import type { Driver, Instance, Origin, Reading, State } from "../../main.ts";
import { deadline } from "../shared/async.ts";
import { messageOf } from "../shared/errors.ts";
import type { Records } from "./records.ts";

/** How long a driver may take to look, in milliseconds. Nobody acts on the instance meanwhile, so it cannot be for ever. */
const PATIENCE = 30_000;

const READABLE = {
  Created: false,
  Initializing: true,
  Running: true,
  Paused: true,
  Shutdown: false,
  Stopped: true,
  Standby: true,
  Unknown: true,
} satisfies Record<State, boolean>;

/** Asks the drivers what they see, whatever they do: throw, hang, or answer with nonsense. */
export class Readings {
  readonly #driver: (name: string) => Driver;
  /** Asked, and without an answer past the deadline: not asked again before they have given one. */
  readonly #silent = new Map<string, Reading>();
  /** Whose driver could not take them over yet: that is tried again in the place of a look. */
  readonly #strange = new Set<string>();

  constructor(driver: (name: string) => Driver) {
    this.#driver = driver;
  }

  /** What the driver sees, and `Unknown` with the reason where it cannot tell. */
  async read(instance: Instance, how: "inspect" | "adopt" = "inspect"): Promise<Reading> {
    const { id } = instance;
    const silent = this.#silent.get(id);
    if (silent) return silent;
    const method = this.#strange.has(id) ? "adopt" : how;
    if (method === "adopt") this.#strange.add(id);
    const reading = await this.#ask(instance, method);
    if (reading.state !== "Unknown") this.#strange.delete(id);
    return reading;
  }

  /** After the instance is gone. */
  forget(id: string): void {
    this.#strange.delete(id);
  }

  async #ask(instance: Instance, method: "inspect" | "adopt"): Promise<Reading> {
    const { id } = instance;
    try {
      const driver = this.#driver(instance.driver);
      const answer = driver[method](instance);
      const reading = await deadline(answer, PATIENCE, `${method}() of driver "${driver.name}"`).catch((error) => {
        if (!isTimeout(error)) throw error;
        const late: Reading = { state: "Unknown", error: messageOf(error) };
        this.#silent.set(id, late);
        const answered = () => void this.#silent.delete(id);
        answer.then(answered, answered);
        return late;
      });
      if (READABLE[reading?.state] === true) return reading;
      return { state: "Unknown", error: `driver "${driver.name}" answered ${JSON.stringify(reading)}` };
    } catch (error) {
      return { state: "Unknown", error: messageOf(error) };
    }
  }
}

/** Brings a row in line with a reading; where they agree, nothing is written and nothing emitted. */
export function commitReading(
  { records, now }: { records: Records; now(): number },
  instance: Instance,
  reading: Reading,
  origin: Origin,
  detail: Record<string, unknown> = {},
): Instance {
  const { state, transition, started_at, state_error: before } = instance;
  const state_error = reading.state === "Unknown" ? reading.error : null;
  if (state === reading.state && transition === null && before === state_error) return instance;
  const fields: Partial<Instance> = { state: reading.state, state_error, transition: null };
  if (reading.state === "Stopped" && state !== "Stopped") {
    const { exit_code, exit_message } = reading;
    Object.assign(fields, { stopped_at: now(), exit_code, exit_message });
  }
  const runs = reading.state === "Running" || reading.state === "Initializing";
  // A start that was interrupted has begun a new run: how the one before it ended is over.
  if (runs && (started_at === null || transition === "start" || state === "Stopped")) {
    Object.assign(fields, { started_at: now(), stopped_at: null, exit_code: null, exit_message: null });
  }
  return records.update(instance.id, fields, { action: "state", origin, detail });
}

function isTimeout(error: unknown): boolean {
  return error instanceof DOMException && error.name === "TimeoutError";
}
