/** Real machines for the tests of the plugin `qemu`: the image `demo`, built once, and a QEMU that runs it. */
import { createHash } from "node:crypto";
import { createWriteStream, existsSync, mkdtempSync, readdirSync, readFileSync, renameSync, rmSync } from "node:fs";
import { once } from "node:events";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { DatabaseSync } from "node:sqlite";
import { pipeline } from "node:stream/promises";
import type { TestContext } from "node:test";
import { getLogger } from "@logtape/logtape";
import { execa } from "execa";
import { clockArguments } from "../../plugins/qemu/clock.ts";
import { buildDemoImage } from "../../plugins/qemu/demo.ts";
import { Qmp, type QmpOptions } from "../../plugins/qemu/qmp.ts";
import { dial } from "../../plugins/qemu/socket.ts";
import { missingProgram } from "../../plugins/shared/programs.ts";
import { cleanup, freePort, lacking, ROOT, temporaryFolder, until } from "../helpers.ts";

const missing = (programs: string[]) => {
  const program = missingProgram(programs);
  return program === undefined ? null : `there is no ${program}`;
};
export const skipQemu = lacking(missing(["qemu-system-x86_64"]));
/** Of tests that boot the demo image. */
export const skipGuest = lacking(
  missing(["qemu-system-x86_64", "apt-get", "apt-cache", "dpkg-deb"]) ??
    (process.arch === "x64" ? null : `the image is for x64, this is ${process.arch}`),
);
export type Machine = "microvm" | "q35";

let image: Promise<string> | undefined;

/** The folder of the image, built once per machine for each state of the files that it is made of. */
export function demoImage(): Promise<string> {
  return image ??= made();
}

async function made(): Promise<string> {
  const sources = join(ROOT, "plugins", "qemu");
  const files = [
    "demo.ts",
    "cpio.ts",
    "elf.ts",
    "packages.ts",
    ...readdirSync(join(sources, "guest")).map((name) => join("guest", name)),
  ];
  const hash = createHash("sha256");
  for (const file of files.sort()) hash.update(file).update(readFileSync(join(sources, file)));
  const folder = join(tmpdir(), `dormouse-demo-${hash.digest("hex").slice(0, 16)}`);
  if (existsSync(folder)) return folder;
  // Test files run at the same time: one builds it, and the others wait, for apt does one thing at a time.
  const lock = new DatabaseSync(`${folder}.lock`, { timeout: 900_000 });
  const own = mkdtempSync(join(tmpdir(), "dormouse-test-image-"));
  try {
    lock.exec("BEGIN EXCLUSIVE"); // the kernel lets go of it when this process ends, however that is
    if (existsSync(folder)) return folder;
    const cache = join(tmpdir(), "dormouse-demo-packages");
    await buildDemoImage(join(own, "demo"), { log: getLogger("dormouse-test"), cache });
    renameSync(join(own, "demo"), folder);
  } finally {
    lock.close();
    rmSync(own, { recursive: true, force: true });
  }
  return folder;
}

export interface Guest {
  readonly folder: string;
  readonly pid: number;
  /** Path of the agent's socket. */
  readonly agent: string;
  /** Of the guest's port 80. */
  readonly url: string;
  /** The port of this machine that leads to the guest's echo. */
  readonly echo: number;
  /** Resolves to QEMU's exit code. */
  readonly ended: Promise<number | undefined>;
  qmp(options?: QmpOptions): Promise<Qmp>;
}

export interface BootOptions {
  machine: Machine;
  hostname?: string;
  /** Where the files are; a new folder when absent. The same again, with `incoming`, is a restore. */
  folder?: string;
  incoming?: boolean;
  /** As QEMU takes them, after its others. */
  args?: string[];
  /** The RAM file of a guest that sleeps, to read from; what this one changes is its own. */
  forkOf?: string;
}

/** Megabytes of RAM of a test's guest. */
const RAM = 128;

/** Starts a guest under tcg with its network in user space; killed after the test. */
export async function boot(t: TestContext, options: BootOptions): Promise<Guest> {
  const { machine, hostname = "guest", folder = temporaryFolder(t), incoming = false, args = [] } = options;
  const demo = await demoImage();
  const [http, echo] = await freePorts(2);
  const bus = machine === "microvm" ? "device" : "pci";
  const ram = options.forkOf ? `mem-path=${options.forkOf},share=off` : "mem-path=ram,share=on";
  const told = `dormouse.ip=10.0.2.15/24 dormouse.gw=10.0.2.2 dormouse.hostname=${hostname}`;
  const clock = machine === "microvm" ? clockArguments().join(" ") : "";
  const forwards = `hostfwd=tcp:127.0.0.1:${http}-:80,hostfwd=tcp:127.0.0.1:${echo}-:7`;
  const child = execa("qemu-system-x86_64", [
    ...["-M", machine === "microvm" ? "microvm,accel=tcg,memory-backend=ram" : "q35,accel=tcg,memory-backend=ram"],
    ...[
      "-cpu",
      "qemu64",
      "-smp",
      "1",
      "-m",
      `${RAM}M`,
      "-nodefaults",
      "-no-user-config",
      "-display",
      "none",
      "-no-reboot",
    ],
    ...["-object", `memory-backend-file,id=ram,size=${RAM}M,${ram}`],
    ...["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"],
    ...["-kernel", join(demo, "vmlinuz"), "-initrd", join(demo, "initrd.img")],
    ...["-append", `console=ttyS0 quiet panic=-1 reboot=t ${clock} ${told}`],
    ...["-chardev", "file,id=console,path=serial.log,append=on", "-serial", "chardev:console"],
    ...["-chardev", "socket,id=qmp,path=qmp.sock,server=on,wait=off", "-mon", "chardev=qmp,mode=control"],
    ...["-chardev", "socket,id=agent,path=agent.sock,server=on,wait=off", "-device", `virtio-serial-${bus}`],
    ...["-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"],
    ...["-object", "rng-random,id=rng,filename=/dev/urandom", "-device", `virtio-rng-${bus},rng=rng`],
    ...["-netdev", `user,id=net0,${forwards}`, "-device", `virtio-net-${bus},netdev=net0,mac=52:54:00:00:00:01`],
    ...["-device", "pvpanic"],
    ...(incoming ? ["-incoming", "defer"] : []),
    ...args,
  ], { cwd: folder, stdin: "ignore", reject: false, all: true });
  cleanup(t).defer(async () => {
    child.kill("SIGKILL");
    await child;
  });
  const path = join(folder, "qmp.sock");
  let output: string | undefined;
  void child.then(({ all }) => output = all ?? "");
  await until("QEMU listens", () => {
    if (output !== undefined) throw new Error(`QEMU ended: ${output}`);
    return existsSync(path) && existsSync(join(folder, "agent.sock"));
  });
  return {
    folder,
    pid: child.nodeChildProcess.pid!,
    agent: join(folder, "agent.sock"),
    url: `http://127.0.0.1:${http}/`,
    echo,
    ended: child.then(({ exitCode }) => exitCode),
    qmp: (options) => Qmp.connect(path, options),
  };
}

export interface Report {
  hostname: string;
  requests: number;
  uptime: number;
  clock: number;
  boots: number | null;
}

/**
 * What the guest answers to `GET /`, asked until it does. The network in user space takes connections before there is
 * a guest, and may deliver what was given up: where requests are counted, wait for the agent first.
 */
export async function report({ url }: Guest, ms = 60_000): Promise<Report> {
  let answer: Report | undefined;
  await until(`an answer from ${url}`, async () => {
    const response = await fetch(url, { signal: AbortSignal.timeout(20_000) }).catch(() => undefined);
    if (response?.ok) answer = await response.json() as Report;
    else await response?.body?.cancel();
    return answer !== undefined;
  }, ms);
  return answer!;
}

/** Puts a guest to sleep: its RAM stays in the file `ram`, all else of it goes to `state`, and its QEMU ends. */
export async function standby(guest: Guest): Promise<void> {
  using qmp = await guest.qmp();
  await shareRam(qmp);
  await qmp.execute("stop");
  const path = join(guest.folder, "out.sock");
  const server = createServer().listen(path);
  await once(server, "listening");
  const [[socket]] = await Promise.all([once(server, "connection"), qmp.execute("migrate", { uri: `unix:${path}` })]);
  await pipeline(socket, createWriteStream(join(guest.folder, "state")));
  await once(server.close(), "close");
  await migrated(qmp);
  await qmp.quit();
  await guest.ended;
}

/** Has a guest that was started with `incoming` take over what {@linkcode standby} left in `folder`; it does not run yet. */
export async function restore(guest: Guest, qmp: Qmp, folder = guest.folder): Promise<void> {
  await shareRam(qmp);
  const path = join(guest.folder, "in.sock");
  await qmp.execute("migrate-incoming", { uri: `unix:${path}` });
  const socket = await dial(path);
  await once(socket.end(readFileSync(join(folder, "state"))), "close");
  await migrated(qmp);
}

async function shareRam(qmp: Qmp): Promise<void> {
  await qmp.execute("migrate-set-capabilities", { capabilities: [{ capability: "x-ignore-shared", state: true }] });
}

async function migrated(qmp: Qmp): Promise<void> {
  await until("the state has been transferred", async () => {
    const { status, "error-desc": reason } = await qmp.execute("query-migrate") as Record<string, string>;
    if (status === "failed") throw new Error(`The transfer failed: ${reason}`);
    return status === "completed";
  });
}

async function freePorts(count: number): Promise<number[]> {
  const ports: number[] = [];
  while (ports.length < count) ports.push(await freePort());
  return ports;
}
