import { existsSync, readFileSync, statSync } from "node:fs";
import { execa } from "execa";
import { delay } from "../shared/async.ts";
import { isAlive, type ProcessId } from "../shared/proc.ts";
import type { Image } from "./images.ts";
import { FILES, memoryArguments } from "./machine.ts";
import { Qmp, type QmpEvent } from "./qmp.ts";
import type { Launch, Owner, Records } from "./records.ts";
import { ConnectionLost } from "./socket.ts";

/** Milliseconds between two attempts to reach a monitor that is not there yet. */
const RETRY_MS = 5;
/** Milliseconds for a killed process to be gone. */
const DEATH_MS = 10_000;

/**
 * Becomes QEMU, after it has written down which process that is and has taken away the file without which nobody goes on:
 * a host that died on the way has left either a launch that can be withdrawn or one that can be found. Files are opened
 * here, by who may reach them. Cgroups are joined meanwhile, as the kernel takes its time over that.
 */
const BECOME = `
go=$1 pid=$2 log=$3 kernel=$4 initrd=$5 disk=$6 memory=$7
shift 7
exec >>"$log" 2>&1 </dev/null
join() { while [ "$1" != -- ]; do echo "$$" >"$1" || return; shift; done; }
join "$@" &
while [ "$1" != -- ]; do shift; done
shift
cat "/proc/$$/stat" >"$pid.tmp" && mv -- "$pid.tmp" "$pid" || exit 126
rm -- "$go" || exit 126
wait "$!" || exit 126
exec ${FILES.kernel}<"$kernel" ${FILES.initrd}<"$initrd" ${FILES.disk}<"$disk" ${FILES.memory}<>"$memory" || exit 126
exec "$@"
`;

/** For a machine on which only root may open /dev/net/tun: one that all may, seen by this process alone. */
const OWN_TUN = `
mount -t tmpfs -o mode=0755,size=64k dormouse /dev/net && mknod -m 0666 /dev/net/tun c 10 200 || exit 126
exec "$@"
`;

export interface LaunchOptions {
  records: Records;
  launch: Launch;
  image: Image;
  /** Whom QEMU runs as; null for this process's own user. */
  owner: Owner | null;
  /** Whether it waits for a device state in the place of booting. */
  incoming: boolean;
}

/** Starts QEMU, detached: it outlives this host. Nothing is known of it yet when this returns. */
export function startQemu({ records, launch, image, owner, incoming }: LaunchOptions): void {
  const command = [
    "qemu-system-x86_64",
    ...launch.args,
    ...memoryArguments(launch.memory),
    ...(incoming ? ["-incoming", "defer"] : []),
  ];
  const files = [records.go(launch), records.pidFile(launch), records.qemuLog];
  const opened = [
    image.kernel,
    image.initrd ?? "/dev/null",
    image.disk?.file ?? "/dev/null",
    launch.memory.shared ? records.ram : records.base,
  ];
  const inner = [...launch.joins ?? [], "--", ...lowered(owner, launch), ...command];
  const shell = execa("/bin/sh", ["-c", BECOME, "dormouse-qemu", ...files, ...opened, ...inner], {
    cwd: records.folder,
    detached: true,
    cleanup: false,
    stdio: "ignore",
    buffer: false,
    reject: false,
  });
  shell.nodeChildProcess.unref();
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
  onEvent: (event: QmpEvent) => void;
}

/**
 * Connects to the monitor of a launch, as soon as it is there.
 *
 * @throws {Error} where QEMU ended first, with what it said; where it does not answer in time; the signal's reason
 */
export async function connectQmp(
  records: Records,
  launch: Launch,
  { signal, timeout, onEvent }: ConnectOptions,
): Promise<{ qmp: Qmp; main: ProcessId }> {
  const end = performance.now() + timeout;
  const logged = statSync(records.qemuLog, { throwIfNoEntry: false })?.size ?? 0;
  for (;;) {
    signal?.throwIfAborted();
    const main = records.processOf(launch);
    const left = end - performance.now();
    if (main && !isAlive(main)) throw new Error(`QEMU ended: ${lastLine(records.qemuLog, logged)}`);
    if (left <= 0) throw new Error(`QEMU did not answer within ${timeout} ms: ${lastLine(records.qemuLog, logged)}`);
    try {
      if (main) {
        const qmp = await Qmp.connect(records.path("run/qmp.sock"), {
          timeout: left,
          onEvent,
          ...(signal && { signal }),
        });
        return { qmp, main };
      }
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
  if (!existsSync(log)) return "it said nothing";
  return readFileSync(log).subarray(size).toString("utf8").trim().split("\n").at(-1) || "it said nothing";
}
