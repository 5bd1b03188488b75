import type { Logger } from "@logtape/logtape";
import process from "node:process";
import type { Cgroup } from "../shared/cgroup.ts";
import { Hierarchy, ownerOf } from "../shared/hierarchy.ts";
import { type Accel, TRANSLATION_MIB } from "./machine.ts";

const MIB = 2 ** 20;
/**
 * Bytes of QEMU's own: its heap and its devices, a stack for each vcpu, page tables of the host's and under KVM of the
 * guest's, and what tcg translates.
 */
const OVERHEAD = { fixed: 96 * MIB, vcpu: 8 * MIB, share: 1 / 64, tcg: TRANSLATION_MIB * MIB };
/** Of a CPU, for the threads that are no vcpu: they carry the guest's packets and blocks. */
const OVERHEAD_CPUS = 0.5;
/** Threads of QEMU that are no vcpu; those that do blocks alone may be 64. */
const OVERHEAD_TASKS = 128;

export interface MachineSize {
  readonly vcpus: number;
  /** Of memory. */
  readonly bytes: number;
  readonly accel: Accel;
}

/**
 * What QEMU and its guest may use together. The guest's memory is counted as it is touched, as cache of its file: where
 * the limit is met, the kernel writes some of it back and goes on.
 */
export function limitsOf({ vcpus, bytes, accel }: MachineSize) {
  const { fixed, vcpu, share, tcg } = OVERHEAD;
  const overhead = fixed + vcpus * vcpu + Math.ceil(bytes * share) + (accel === "tcg" ? tcg : 0);
  return { memory_bytes: bytes + overhead, cpus: vcpus + OVERHEAD_CPUS, tasks: vcpus + OVERHEAD_TASKS };
}

export interface LimitsOptions {
  /** The cgroup that holds those of all data_dirs; empty to do without. */
  parent: string;
  /** The folder of the instances, which tells this data_dir from all others. */
  folder: string;
  log: Logger;
}

/**
 * The cgroups of the machines, `PARENT/OWNER/ID`. A machine keeps its group in its sleep: its memory is still counted
 * there, which would hold on to a group that was removed.
 */
export class Limits {
  readonly #hierarchy: Hierarchy | undefined;
  readonly #log: Logger;
  #lacking = "";

  constructor({ parent, folder, log }: LimitsOptions) {
    const root = process.getuid?.() === 0;
    const found = Hierarchy.find(parent, ownerOf(folder), { root, controllers: ["memory", "cpu", "pids"] });
    this.#hierarchy = found instanceof Hierarchy ? found : undefined;
    this.#log = log;
    if (!this.#hierarchy) log.warn("No cgroups, so no limits of machines: {reason}", { reason: found });
  }

  /** Makes the group of a machine that is about to start, or sets its limits anew: what QEMU has to join. */
  prepare(id: string, size: MachineSize): readonly string[] {
    const group = this.#group(id);
    if (!group) return [];
    const lacking = group.make(limitsOf(size)).join(" and ");
    if (lacking !== this.#lacking && lacking !== "") {
      this.#log.warn("No limits of {lacking} for machines: no such cgroup controller", { lacking });
    }
    this.#lacking = lacking;
    return group.joins;
  }

  /** Whether the kernel has ended the machine for want of memory. */
  ranOut(id: string): boolean {
    return this.#group(id)?.ranOutOfMemory() ?? false;
  }

  /** Removes the group of a machine that has ended; what is not there is no error. */
  async remove(id: string): Promise<void> {
    await this.#group(id)?.remove();
  }

  /** The ids of the groups that there are. */
  ids(): Set<string> {
    return this.#hierarchy?.ids() ?? new Set();
  }

  /** Lets go of them; those of machines stay. */
  [Symbol.dispose](): void {
    this.#hierarchy?.tidy();
  }

  #group(id: string): Cgroup | undefined {
    return this.#hierarchy?.group(id);
  }
}
