import { Buffer } from "node:buffer";
import { closeSync, existsSync, openSync, readSync, rmSync, statSync, writeFileSync } from "node:fs";
import { writeFile } from "node:fs/promises";
import { execa } from "execa";
import { delay } from "../shared/async.ts";
import { ownerOf } from "../shared/hierarchy.ts";
import { isAlive, type ProcessId, processStat } from "../shared/proc.ts";
import { bareEnvironment } from "../shared/programs.ts";
import type { Image } from "./image.ts";
import { FILES, memoryArguments, wokenArguments } from "./machine.ts";
import { Qmp, type QmpEvent } from "./qmp.ts";
import type { Launch, Owner, Records } from "./records.ts";
import { ConnectionLost } from "./socket.ts";

/** Milliseconds between two attempts to reach a monitor that is not there yet. */
const RETRY_MS = 1;
/** Bytes of a line of QEMU's log, which may be as long as it likes. */
const MAX_LINE = 1_000;
/** Milliseconds for a killed process to be gone. */
const DEATH_MS = 10_000;

/** Opens files, as who may reach them, and goes on to become QEMU. */
const BECOME = `
log=$1 kernel=$2 initrd=$3 disk=$4 memory=$5 state=$6
shift 6
exec >>"$log" 2>&1
exec ${FILES.kernel}<"$kernel" ${FILES.initrd}<"$initrd" ${FILES.disk}<"$disk" || exit 126
exec ${FILES.memory}<>"$memory" ${FILES.state}<"$state" || exit 126
exec "$@"
`;
/** As far as it gets until its host has written down which process it is; a host that died before never says so. */
const WAIT = `read -r go && exec "$@" </dev/null`;

/** For a machine on which only root may open /dev/net/tun: one that all may, seen by this process alone. */
const OWN_TUN = `
mount -t tmpfs -o mode=0755,size=64k dormouse /dev/net && mknod -m 0666 /dev/net/tun c 10 200 || exit 126
exec "$@"
`;

export interface LaunchOptions {
  records: Records;
  launch: Pick<Launch, "args" | "memory" | "device" | "joins">;
  image: Image;
  /** Whom QEMU runs as; null for this process's own user. */
  owner: Owner | null;
  /** Whether it waits for a device state in the place of booting. */
  incoming: boolean;
}

/** What becomes QEMU once it is told to. */
export interface Held extends Disposable {
  /** Has it join its cgroups. The kernel takes its time over that, and nothing begins or ends in that time. */
  join(): Promise<unknown>;
  /** Lets it go, once the process is kept in `pidFile`: that is where a host that died on the way left it to be found. */
  go(pidFile: string): ProcessId;
}

/** Starts what becomes QEMU, detached: it outlives this host. It waits, and ends where it is let go of before. */
export function holdQemu({ records, launch, image, owner, incoming }: LaunchOptions): Held {
  const command = [
    "qemu-system-x86_64",
    ...(incoming ? wokenArguments(launch.args) : launch.args),
    ...memoryArguments(launch.memory),
    ...(incoming ? ["-incoming", "defer"] : []),
  ];
  const opened = [
    records.qemuLog,
    image.kernel,
    image.initrd ?? "/dev/null",
    image.disk?.file ?? "/dev/null",
    launch.memory.shared ? records.ram : records.base,
    incoming ? records.path("state") : "/dev/null",
  ];
  const logged = sizeOf(records.qemuLog);
  // One of before would be taken for one that does not listen yet.
  rmSync(records.path("run/qmp.sock"), { force: true });
  const inner = [...lowered(owner, launch), "/bin/sh", "-c", WAIT, "dormouse-go", ...command];
  const shell = execa("/bin/sh", ["-c", BECOME, "dormouse-qemu", ...opened, ...inner], {
    cwd: records.folder,
    // What this process was told in confidence is not for a QEMU, which is not trusted.
    extendEnv: false,
    env: bareEnvironment(),
    detached: true,
    cleanup: false,
    stdio: ["pipe", "ignore", "ignore"],
    buffer: false,
    reject: false,
  });
  const { nodeChildProcess: child } = shell;
  child.unref();
  child.stdin!.on("error", () => {}); // it has ended, which is found out when it is looked for
  return {
    join: () => Promise.all((launch.joins ?? []).map((file) => writeFile(file, String(child.pid)))),
    go(pidFile) {
      // One that is no longer ours to reap may be another process already.
      const main = child.pid === undefined || child.exitCode !== null ? undefined : processStat(child.pid);
      if (!main || !isAlive(main)) throw new Error(`QEMU ended: ${lastLine(records.qemuLog, logged)}`);
      writeFileSync(pidFile, `${main.pid} ${main.started} ${ownerOf(records.folder)}\n`);
      child.stdin!.end("go\n");
      return { pid: main.pid, started: main.started };
    },
    [Symbol.dispose]: () => void child.stdin!.end(),
  };
}

/** What is put before a command to have it run as `owner`; one that uses KVM is in the group that may do so. */
export function lowered(owner: Owner | null, { args, device }: Pick<Launch, "args" | "device">): string[] {
  if (owner === null) return [];
  const kvm = args.some((arg) => arg.includes("accel=kvm")) ? groupOf("/dev/kvm") : undefined;
  const groups = kvm ? `--groups=${kvm}` : "--clear-groups";
  const drop = ["setpriv", `--reuid=${owner.uid}`, `--regid=${owner.gid}`, groups, "--no-new-privs", "--"];
  const closed = device !== null && (statSync("/dev/net/tun").mode & 0o006) !== 0o006;
  return closed ? ["unshare", "--mount", "--", "/bin/sh", "-c", OWN_TUN, "dormouse-tun", ...drop] : drop;
}

/** The group that may use a device; never root's, which may much more. */
function groupOf(device: string): number | undefined {
  const { gid, mode } = statSync(device);
  return gid !== 0 && (mode & 0o060) === 0o060 ? gid : undefined;
}

export interface ConnectOptions {
  signal?: AbortSignal;
  /** Milliseconds until it must have answered. */
  timeout: number;
  /** Whether the greeting is enough, to tell it what is to be done while it is still on its way. */
  early?: boolean;
  onEvent: (event: QmpEvent) => void;
}

/**
 * Connects to the monitor of a process, as soon as it is there.
 *
 * @throws {Error} where QEMU ended first, with what it said; where it does not answer in time; the signal's reason
 */
export async function connectQmp(
  records: Records,
  main: ProcessId,
  { signal, timeout, early = false, onEvent }: ConnectOptions,
): Promise<Qmp> {
  const end = performance.now() + timeout;
  const logged = sizeOf(records.qemuLog);
  const path = records.path("run/qmp.sock");
  for (;;) {
    signal?.throwIfAborted();
    const left = end - performance.now();
    if (!isAlive(main)) throw new Error(`QEMU ended: ${lastLine(records.qemuLog, logged)}`);
    if (left <= 0) throw new Error(`QEMU did not answer within ${timeout} ms: ${lastLine(records.qemuLog, logged)}`);
    try {
      const connect = early ? Qmp.open : Qmp.connect;
      if (existsSync(path)) return await connect(path, { timeout: left, onEvent, ...(signal && { signal }) });
    } catch (error) {
      const { code } = error as NodeJS.ErrnoException;
      // One that has just ended has closed it; the next look tells.
      if (!(error instanceof ConnectionLost) && !["ENOENT", "ECONNREFUSED"].includes(code ?? "")) throw error;
    }
    await delay(RETRY_MS, signal && { signal });
  }
}

/** Resolves when a process is gone. @throws where it does not go within {@linkcode DEATH_MS}; with a signal, only its reason */
export async function untilDead(main: ProcessId, signal?: AbortSignal): Promise<void> {
  const end = performance.now() + DEATH_MS;
  for (let pause = 2; isAlive(main); pause = Math.min(pause * 1.5, 50)) {
    if (!signal && performance.now() > end) throw new Error(`QEMU (process ${main.pid}) does not end`);
    await delay(pause, signal && { signal });
  }
}

/** What QEMU said last since its log had that size. */
export function lastLine(log: string, size = 0): string {
  const [tail, from] = [Buffer.alloc(MAX_LINE), Math.max(size, sizeOf(log) - MAX_LINE)];
  if (!existsSync(log)) return "it said nothing";
  const file = openSync(log, "r");
  try {
    const read = readSync(file, tail, 0, MAX_LINE, from);
    return tail.toString("utf8", 0, read).trim().split("\n").at(-1) || "it said nothing";
  } finally {
    closeSync(file);
  }
}

/** Bytes of a log, which may not be there. */
export function sizeOf(log: string): number {
  return statSync(log, { throwIfNoEntry: false })?.size ?? 0;
}
