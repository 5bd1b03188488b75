import { readdirSync, readFileSync } from "node:fs";
import process from "node:process";
import { readIfThere } from "./files.ts";

/** What tells a process from every other since the machine started: its pid may be given out again, both never are. */
export interface ProcessId {
  readonly pid: number;
  /** Clock ticks from the start of the machine to that of the process; field 22 of `/proc/PID/stat`. */
  readonly started: number;
}

export interface ProcessStat extends ProcessId {
  /** `R`, `S`, `T`, `Z` and the others of proc(5). */
  readonly state: string;
  readonly parent: number;
  readonly session: number;
  /** Of the process and of the children it has waited for. */
  readonly cpuSeconds: number;
}

/** `USER_HZ`: a constant 100 of the interface, whatever the kernel's own rate is. */
const TICKS_PER_SECOND = 100;

/**
 * What `/proc` says of a process; undefined where there is none. A zombie counts as one here, see {@linkcode isAlive}.
 *
 * @throws where the process is there and cannot be read, as with `hidepid`
 */
export function processStat(pid: number): ProcessStat | undefined {
  let text: string;
  try {
    text = readFileSync(`/proc/${pid}/stat`, "latin1");
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code !== "ENOENT" && code !== "ESRCH") throw error;
    if (!hidden(pid)) return undefined;
    throw new Error(`Cannot read process ${pid}: it is hidden from this user`, { cause: error });
  }
  // The second field is the program's name in parentheses and may hold anything, spaces and parentheses included.
  const fields = text.slice(text.lastIndexOf(")") + 2).split(" ");
  const field = (number: number) => Number(fields[number - 3]);
  return {
    pid,
    started: field(22),
    state: fields[0],
    parent: field(4),
    session: field(6),
    cpuSeconds: (field(14) + field(15) + field(16) + field(17)) / TICKS_PER_SECOND,
  };
}

/** Whether exactly this process still runs: one that took over its pid is another, and a zombie is dead. */
export function isAlive({ pid, started }: ProcessId): boolean {
  const stat = processStat(pid);
  return stat !== undefined && stat.started === started && stat.state !== "Z" && stat.state !== "X";
}

/** Milliseconds since a process started, the time in which the machine was suspended included. */
export function processAge({ started }: ProcessId): number {
  const uptime = Number(readFileSync("/proc/uptime", "latin1").split(" ")[0]);
  return (uptime - started / TICKS_PER_SECOND) * 1000;
}

/** Every process that can be seen. */
export function processes(): ProcessStat[] {
  return readdirSync("/proc").flatMap((name) => {
    if (!/^\d+$/.test(name)) return [];
    return processStat(Number(name)) ?? [];
  });
}

/** Bytes of a process that are in memory (`rss`) and mapped (`vms`); zeros where it is gone. */
export function processMemory(pid: number): { rss: number; vms: number } {
  const text = readIfThere(`/proc/${pid}/status`) ?? "";
  const bytes = (key: string) => Number(new RegExp(`^${key}:\\s+(\\d+) kB`, "m").exec(text)?.[1] ?? 0) * 1024;
  return { rss: bytes("VmRSS"), vms: bytes("VmSize") };
}

/** Sends a signal to a process, or with a negative pid to its group; false where there is none. */
export function signalProcess(pid: number, signal: NodeJS.Signals): boolean {
  try {
    return process.kill(pid, signal);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ESRCH") return false;
    throw error;
  }
}

/** Numbers of capabilities(7). */
const CAPABILITIES = { CAP_SETGID: 6, CAP_SETUID: 7, CAP_SYS_CHROOT: 18, CAP_SYS_ADMIN: 21 } as const;

/** Whether this process has a capability: root in a container may lack what root elsewhere has. */
export function hasCapability(name: keyof typeof CAPABILITIES): boolean {
  const effective = /^CapEff:\s+([0-9a-f]+)$/m.exec(readFileSync("/proc/self/status", "latin1"))?.[1] ?? "0";
  return (BigInt(`0x${effective}`) >> BigInt(CAPABILITIES[name]) & 1n) === 1n;
}

let boot: string | undefined;

/** Another one after every start of the machine; pids and start times of before mean nothing after. */
export function bootId(): string {
  return boot ??= readFileSync("/proc/sys/kernel/random/boot_id", "latin1").trim();
}

function hidden(pid: number): boolean {
  try {
    return process.kill(pid, 0);
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === "EPERM";
  }
}
