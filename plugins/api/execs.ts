import { DormouseError, type GuardContext, type Instance, type PluginHooks, Veto } from "../../main.ts";

/**
 * The commands that run in instances by request. A driver freezes or cuts off what runs in an instance that falls asleep
 * or pauses, so none does before they have ended, and none is begun in one that is about to.
 */
export class Execs {
  readonly #running = new Map<string, number>();
  /** Those that may stand still, until the registry's row says that they do, or it came to nothing. */
  readonly #leaving = new Set<string>();

  constructor(hooks: PluginHooks) {
    hooks.guard("before:standby", (context) => this.#leave(context));
    hooks.guard("before:pause", (context) => this.#leave(context));
    // A running source sleeps for its copy.
    hooks.guard("before:fork", (context) => this.#leave(context));
    hooks.commit("instance:commit", ({ event }) => void this.#leaving.delete(event.instance_id));
    hooks.on("action:done", ({ instance_id }) => void this.#leaving.delete(instance_id), {
      consumer: "execs",
      lagged: () => this.#leaving.clear(),
    });
  }

  /** Does `work` in an instance that stays awake meanwhile. @throws {DormouseError} `invalid_state` */
  async run<T>(instance: Instance, work: () => Promise<T>): Promise<T> {
    const { id, name, state } = instance;
    const leaving = this.#leaving.has(id);
    if (leaving || (state !== "Running" && state !== "Initializing")) {
      const message = `Cannot exec in instance "${name}": ${
        leaving ? "it is about to stand still" : `state is ${state}`
      }`;
      throw new DormouseError("invalid_state", message, { details: { state } });
    }
    this.#running.set(id, this.#count(id) + 1);
    try {
      return await work();
    } finally {
      const left = this.#count(id) - 1;
      if (left > 0) this.#running.set(id, left);
      else this.#running.delete(id);
    }
  }

  #leave({ instance: { id, name }, signal }: GuardContext): void {
    // Overtaken while other guards thought about it: nothing comes of it, and nothing would tell.
    if (signal.aborted) return;
    const count = this.#count(id);
    if (count > 0) throw new Veto("exec_under_way", `${count} command(s) run in instance "${name}" by request`);
    this.#leaving.add(id);
  }

  #count(id: string): number {
    return this.#running.get(id) ?? 0;
  }
}
