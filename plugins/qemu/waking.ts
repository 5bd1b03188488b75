import type { Instance } from "../../main.ts";
import { messageOf } from "../shared/errors.ts";
import { putAway } from "./asleep.ts";
import type { Fleet } from "./fleet.ts";
import type { Power } from "./power.ts";
import { Unrestorable } from "./snapshot.ts";
import type { Vm } from "./vm.ts";

const UNKNOWN = () => ({ state: "Unknown" } as const);

/** Wakes machines that sleep, and decides what becomes of those that do not wake. */
export class Waking {
  readonly #fleet: Fleet;
  readonly #power: Power;

  constructor(fleet: Fleet, power: Power) {
    this.#fleet = fleet;
    this.#power = power;
  }

  /** Restores it, or boots it anew where that fails and its policy is to lose its memory rather than its service. */
  async wake(vm: Vm, instance: Instance, signal: AbortSignal): Promise<"Initializing" | "Running"> {
    try {
      return await this.#power.restore(vm, instance, signal);
    } catch (error) {
      if (signal.aborted || vm.disposed || instance.policies.restore_fallback !== "start") {
        putAway(this.#fleet, instance);
        throw error;
      }
      const { state } = await vm.look().catch(UNKNOWN);
      // It went on, and only its answer got lost.
      if (state === "Initializing" || state === "Running") return this.#power.watch(vm, instance);
      if (state !== "Standby" && state !== "Stopped") throw error;
      try {
        await this.#power.boot(vm, instance, signal);
      } finally {
        if (vm.records.snapshot()) putAway(this.#fleet, instance);
        else this.#fleet.context.lost(instance, messageOf(error));
      }
      return this.#power.watch(vm, instance);
    }
  }

  /**
   * Wakes a machine that is to be stopped, if it sleeps: what its guest has not written to its disk yet is in its memory.
   * False for one that can never wake.
   *
   * @throws where it may wake another time; it sleeps on
   */
  async rouse(vm: Vm, instance: Instance, signal: AbortSignal): Promise<boolean> {
    if ((await vm.look().catch(UNKNOWN)).state !== "Standby") return true;
    try {
      await this.#power.restore(vm, instance, signal);
    } catch (error) {
      if (error instanceof Unrestorable) {
        this.#fleet.context.lost(instance, messageOf(error));
        return false;
      }
      // Else it went on, and only its answer got lost.
      if ((await vm.look().catch(UNKNOWN)).state === "Standby") {
        putAway(this.#fleet, instance);
        throw error;
      }
    }
    return true;
  }
}
