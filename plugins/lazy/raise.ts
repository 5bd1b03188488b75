import { DormouseError, type Host, type Hypervisor, type Instance } from "../../main.ts";
import { abortable } from "../shared/async.ts";
import type { Clock } from "../shared/clock.ts";
import { ACTOR } from "./entry.ts";

const ORIGIN = { actor: ACTOR, cause: "acquire" };
/** Actions that are tried, for each may find that another one got in before it. */
const TURNS = 5;
/** Milliseconds between two looks at whether it is ready. */
const FIRST_PAUSE = 25;
const LONGEST_PAUSE = 500;

export interface Raising {
  readonly hypervisor: Hypervisor;
  readonly hooks: Host["hooks"];
  readonly clock: Clock;
  /** Milliseconds. */
  readonly timeout: number;
  readonly signal: AbortSignal;
}

/**
 * Resolves once the instance runs and is healthy. Each turn is an action of the registry, also where the instance runs as
 * it seems: behind it in its lane no stop is under way any more, and a standby that is gets aborted by it.
 *
 * @throws {DormouseError} the registry's own; `lazy_start_failed` where it does not stay up
 */
export async function raise(id: string, raising: Raising): Promise<void> {
  const { hypervisor, signal } = raising;
  for (let turn = 1;; turn++) {
    signal.throwIfAborted();
    const { state, transition } = existing(hypervisor, id);
    const asleep = state === "Standby" || transition === "standby" || transition === "restore";
    try {
      await abortable(asleep ? hypervisor.restore(id, ORIGIN) : hypervisor.start(id, ORIGIN), signal);
      break;
    } catch (error) {
      // Another action got in before: the next turn goes by where that has led.
      const moved = error instanceof DormouseError && error.code === "invalid_state" && !rests(hypervisor.find(id));
      if (!moved || turn === TURNS) throw error;
    }
  }
  await ready(id, raising);
}

/** What somebody has paused is left so, and nobody acts on what cannot be told. */
function rests(instance: Instance | undefined): boolean {
  return instance?.state === "Unknown" || (instance?.state === "Paused" && instance.transition === null);
}

/** Asks those who know until they say that it is, less and less often. */
async function ready(id: string, { hypervisor, hooks, clock, timeout, signal }: Raising): Promise<void> {
  for (let pause = FIRST_PAUSE;; pause = Math.min(pause * 2, LONGEST_PAUSE)) {
    signal.throwIfAborted();
    const instance = existing(hypervisor, id);
    if (instance.state === "Running") {
      // Why it is not yet ready is what is being waited out.
      const passed = await abortable(hooks.ask("wake:ready", { instance, signal }), signal).then(
        () => true,
        () => false,
      );
      if (passed && hypervisor.find(id)?.state === "Running") return;
    } else if (instance.state === "Created" || instance.state === "Initializing") {
      await hypervisor.wait(id, "Running", { timeout, signal });
      continue;
    } else if (instance.state !== "Unknown" && instance.transition !== "fork") throw ended(instance);
    await paused(clock, pause, signal);
  }
}

function ended({ name, state, exit_message }: Instance): DormouseError {
  const why = state === "Stopped" && exit_message !== null ? ` (${exit_message})` : "";
  const message = `Cannot acquire instance "${name}": before it was ready its state became ${state}${why}`;
  return new DormouseError("lazy_start_failed", message);
}

async function paused(clock: Clock, ms: number, signal: AbortSignal): Promise<void> {
  const { promise, resolve } = Promise.withResolvers<void>();
  const cancel = clock.after(ms, resolve);
  try {
    await abortable(promise, signal);
  } finally {
    cancel();
  }
}

function existing(hypervisor: Hypervisor, id: string): Instance {
  const instance = hypervisor.find(id);
  if (!instance) throw new DormouseError("not_found", `No instance "${id}": it was deleted`);
  return instance;
}
