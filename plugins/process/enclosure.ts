import { constants } from "node:os";
import { delay } from "../shared/async.ts";
import { readIfThere } from "../shared/files.ts";
import { processes, type ProcessId, type ProcessStat, processStat, signalProcess } from "../shared/proc.ts";

/** All processes of one instance, those that it started and those that these started in turn. */
export interface Enclosure {
  /** Files to which a process writes `0` to become a member. */
  readonly joins: readonly string[];
  members(): number[];
  isFrozen(): boolean;
  /** Resolves once no member runs any more. An abort thaws them and rejects with the signal's reason. */
  freeze(signal?: AbortSignal): Promise<void>;
  thaw(): Promise<void>;
  /** SIGTERM to every member, which is thawed to receive it. */
  terminate(): Promise<void>;
  /** Resolves once no member is left. */
  kill(): Promise<void>;
  /** {@linkcode Enclosure.kill}, and removes what the enclosure itself is made of. */
  remove(): Promise<void>;
}

const ROUNDS = 200;
/**
 * Stopped, traced, and asleep in the kernel: that one stops before it is back in its program. A shell stays there when
 * its child is stopped between vfork and exec.
 */
const STOPPED = ["T", "t", "D"];

/**
 * What can be known of an instance without cgroups: the session that its first process leads, and all descendants. A
 * daemon that leaves the session and loses its parent escapes from it.
 */
export class Session implements Enclosure {
  readonly joins: readonly string[] = [];
  readonly #leader: ProcessId;

  constructor(leader: ProcessId) {
    this.#leader = leader;
  }

  members(): number[] {
    return this.#members().map(({ pid }) => pid);
  }

  isFrozen(): boolean {
    const { pid, started } = this.#leader;
    // It leaves the kernel for a moment to find that it is to stop, which it has done by the second look.
    const stands = () => {
      const leader = processStat(pid);
      return leader?.started === started && STOPPED.includes(leader.state);
    };
    return stands() || isToStop(pid) || stands();
  }

  async freeze(signal?: AbortSignal): Promise<void> {
    try {
      signal?.throwIfAborted();
      // What it forks while it is being stopped is found in the next round.
      await this.#rounds(({ pid, state }, sent) => !sent.has(pid) || !STOPPED.includes(state), "SIGSTOP", signal);
    } catch (error) {
      await this.thaw();
      throw error;
    }
  }

  async thaw(): Promise<void> {
    for (const { pid } of this.#members()) send(pid, "SIGCONT");
  }

  async terminate(): Promise<void> {
    for (const { pid } of this.#members()) send(pid, "SIGTERM");
    await this.thaw();
  }

  async kill(): Promise<void> {
    await this.#rounds(() => true, "SIGKILL");
  }

  async remove(): Promise<void> {
    await this.kill();
  }

  async #rounds(
    wanted: (member: ProcessStat, sent: ReadonlySet<number>) => boolean,
    name: NodeJS.Signals,
    signal?: AbortSignal,
  ): Promise<void> {
    const sent = new Set<number>();
    const left = () => this.#members().filter((member) => wanted(member, sent)).map(({ pid }) => pid);
    for (let round = 0; round < ROUNDS; round++) {
      const pids = left();
      if (pids.length === 0) return;
      const reached = pids.filter((pid) => send(pid, name));
      if (reached.length === 0) break;
      for (const pid of reached) sent.add(pid);
      await delay(Math.min(1 + round, 50), signal && { signal });
    }
    const pids = left();
    if (pids.length > 0) throw new Error(`Cannot send ${name} to processes ${pids.join(", ")}: they resist`);
  }

  // A number that is still in use as a session's is not given out as a pid. So where a process of this number started
  // later than ours, the session is its own and nothing is left of ours.
  #members(): ProcessStat[] {
    const { pid: session, started } = this.#leader;
    const all = processes();
    if (all.some((process) => process.pid === session && process.started !== started)) return [];
    const found = new Set(all.filter((process) => process.session === session).map(({ pid }) => pid));
    for (let size = -1; size !== found.size;) {
      size = found.size;
      for (const { pid, parent } of all) if (found.has(parent)) found.add(pid);
    }
    return all.filter(({ pid, state }) => found.has(pid) && state !== "Z" && state !== "X");
  }
}

/** False for a process that has become somebody else, to whom this host may send nothing. */
function send(pid: number, name: NodeJS.Signals): boolean {
  try {
    signalProcess(pid, name);
    return true;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "EPERM") return false;
    throw error;
  }
}

/** Whether a SIGSTOP waits for it to leave the kernel, see proc_pid_status(5). */
function isToStop(pid: number): boolean {
  const bit = 1n << BigInt(constants.signals.SIGSTOP - 1);
  const pending = readIfThere(`/proc/${pid}/status`)?.matchAll(/^(?:SigPnd|ShdPnd):\s+([0-9a-f]+)$/gm) ?? [];
  return [...pending].some(([, mask]) => (BigInt(`0x${mask}`) & bit) !== 0n);
}
