import { Buffer } from "node:buffer";
import { DormouseError, type Instance } from "../../main.ts";
import { clockArguments } from "./clock.ts";
import type { Image } from "./image.ts";
import type { Launch } from "./records.ts";

/** The contract's names of the two kinds of machine. */
export const MACHINES = { "qemu-microvm": "microvm", "qemu": "q35" } as const;
export type DriverName = keyof typeof MACHINES;
export type Accel = "kvm" | "tcg";

/** The port of virtio-serial into which a guest writes the exit code of its workload before it powers off. */
export const EXIT_PORT = "dormouse.exit";
/** What tcg keeps of translated code: QEMU's own choice, an eighth of this machine's memory, is no limit at all. */
export const TRANSLATION_MIB = 256;
const AGENT_PORT = "org.qemu.guest_agent.0";
/** What the kernel takes of a command line, COMMAND_LINE_SIZE of x86, with room for what the machine adds. */
const MAX_COMMAND_LINE = 1920;

/** The numbers under which a launch opens files that the user that it becomes need not be able to reach. */
export const FILES = { kernel: 3, initrd: 4, disk: 5, memory: 6, state: 7 } as const;
const opened = (name: keyof typeof FILES) => `/proc/self/fd/${FILES[name]}`;

export interface GuestNetwork {
  /** The host's end. */
  readonly device: string;
  readonly mac: string;
  /** With the length of the prefix: `10.88.0.5/16`. */
  readonly address: string;
  readonly gateway: string;
  readonly address6: string | null;
  readonly gateway6: string | null;
}
export interface MachineOptions {
  readonly driver: DriverName;
  readonly accel: Accel;
  readonly image: Image;
  /** Null where it has no network. */
  readonly network: GuestNetwork | null;
}

/** The vcpus and bytes of memory that an instance gets: what it asks for, else its image's. */
export function sizeOf({ vcpus, memory_bytes }: Instance, image: Image): { vcpus: number; bytes: number } {
  // Memory is given in whole pages of 2 MiB, which suits every page size that a machine may map it with.
  const unit = 2 * 1024 * 1024;
  return { vcpus: vcpus ?? image.vcpus, bytes: Math.ceil((memory_bytes ?? image.size) / unit) * unit };
}

/** How the memory is mapped: shared, so that a standby leaves it in its file, or as a private view of another's. */
export function memoryArguments({ bytes, shared }: Launch["memory"]): string[] {
  const backing = `size=${bytes},mem-path=${opened("memory")},share=${shared ? "on" : "off"}`;
  return ["-object", `memory-backend-file,id=ram,${backing}`];
}

/** What a machine boots from. */
const BOOTED_FROM = ["-kernel", "-initrd", "-append"];

/** Of a machine that goes on: what it has booted from is some 20 MB to read, and to keep, of which it sees nothing. */
export function wokenArguments(args: readonly string[]): string[] {
  return args.filter((arg, i) => !BOOTED_FROM.includes(arg) && !BOOTED_FROM.includes(args[i - 1]));
}

/**
 * The arguments of `qemu-system-x86_64`, see its own `invocation` page, but for the memory's. Paths are those of the
 * instance's folder, in which it runs: so none is longer than what a socket's may be.
 */
export function argumentsOf(instance: Instance, options: MachineOptions): string[] {
  const { driver, accel, image, network } = options;
  const { vcpus, bytes } = sizeOf(instance, image);
  // virtio over PCI on the one, over mmio on the other; else the machines differ in nothing that is said here.
  const bus = driver === "qemu" ? "pci" : "device";
  const device = (kind: string, ...rest: string[]) => ["-device", [`virtio-${kind}-${bus}`, ...rest].join()];
  const port = (id: string, name: string) => ["-device", `virtserialport,bus=ports.0,chardev=${id},name=${name}`];
  const socket = (id: string) => ["-chardev", `socket,id=${id},path=run/${id}.sock,server=on,wait=off`];
  const tcg = accel === "tcg";
  const pc = driver === "qemu";
  const machine = [
    ...[MACHINES[driver], "memory-backend=ram", ...(pc ? ["usb=off"] : [])],
    ...(tcg ? [] : ["accel=kvm"]),
  ];
  return [
    ...["-name", nameOf(instance)],
    ...["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"],
    ...["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"],
    // A guest that slept by itself would be neither awake nor asleep to anybody here.
    ...(pc ? ["-global", "ICH9-LPC.disable_s3=1", "-global", "ICH9-LPC.disable_s4=1"] : []),
    ...["-machine", machine.join(), ...(tcg ? ["-accel", `tcg,tb-size=${TRANSLATION_MIB}`] : [])],
    ...["-cpu", tcg ? "qemu64" : "host"],
    ...["-smp", String(vcpus), "-m", `size=${bytes / 1024}K`],
    ...["-kernel", opened("kernel"), ...(image.initrd ? ["-initrd", opened("initrd")] : [])],
    ...["-append", kernelCommandLine(instance, options)],
    ...[...socket("qmp"), "-mon", "chardev=qmp,mode=control"],
    ...["-chardev", "file,id=console,path=serial.log,append=on", "-serial", "chardev:console"],
    ...device("serial", "id=ports"),
    ...[...socket("agent"), ...port("agent", AGENT_PORT)],
    ...["-chardev", "file,id=exit,path=exit,append=on", ...port("exit", EXIT_PORT)],
    ...["-object", "rng-random,id=rng,filename=/dev/urandom", ...device("rng", "rng=rng")],
    ...(image.disk === null ? [] : [...diskArguments(image.disk.format), ...device("blk", "drive=disk")]),
    ...(network === null ? [] : [
      ...["-netdev", `tap,id=net,ifname=${network.device},script=no,downscript=no`],
      ...device("net", "netdev=net", `mac=${network.mac}`),
    ]),
    ...["-device", "pvpanic"],
  ];
}

/** The arguments of one that goes on as a copy of another machine: on the same devices, by its own name and address. */
export function copiedArguments(args: readonly string[], instance: Instance, network: GuestNetwork | null): string[] {
  return args.map((arg, i) => {
    if (args[i - 1] === "-name") return nameOf(instance);
    if (network === null) return arg;
    if (args[i - 1] === "-netdev") return arg.replace(/(?<=,ifname=)[^,]+/, network.device);
    return args[i - 1] === "-device" ? arg.replace(/(?<=,mac=)[^,]+/, network.mac) : arg;
  });
}

function nameOf({ name }: Instance): string {
  return `guest=${name},debug-threads=on`;
}

function diskArguments(format: "raw" | "qcow2"): string[] {
  const base = { driver: format, "read-only": true, file: { driver: "file", filename: opened("disk") } };
  const overlay = { driver: "file", filename: "overlay.qcow2" };
  const disk = { driver: "qcow2", "node-name": "disk", file: overlay, backing: base };
  return ["-blockdev", JSON.stringify(disk)];
}

/**
 * What the guest's init reads from `/proc/cmdline`; its image's own words come first.
 *
 * @throws {DormouseError} `invalid_request` where the command and its variables are more than what a kernel takes
 */
export function kernelCommandLine(
  instance: Instance,
  { image, network, driver, accel }: MachineOptions,
): string {
  const { name, entrypoint, cmd, env, working_dir } = instance;
  const argv = [...entrypoint, ...cmd];
  const work = { argv, env, ...(working_dir !== null && { cwd: working_dir }) };
  const line = [
    ...(image.cmdline === "" ? [] : [image.cmdline]),
    ...(MACHINES[driver] === "microvm" && accel === "tcg" ? clockArguments() : []),
    `dormouse.hostname=${name}`,
    ...(image.dhcp && network !== null ? ["dormouse.dhcp=1"] : addressWords(network)),
    ...(argv.length === 0 ? [] : [`dormouse.run=${Buffer.from(JSON.stringify(work)).toString("base64")}`]),
  ].join(" ");
  if (line.length <= MAX_COMMAND_LINE) return line;
  const reason =
    `the guest's kernel takes ${MAX_COMMAND_LINE} characters for all that it is told, this is ${line.length}`;
  throw new DormouseError(
    "invalid_request",
    `Wrong value of "cmd": with "entrypoint" and "env" it is too long: ${reason}`,
  );
}

function addressWords(network: GuestNetwork | null): string[] {
  if (network === null) return [];
  const { address, gateway, address6, gateway6 } = network;
  const words = [`dormouse.ip=${address}`, `dormouse.gw=${gateway}`];
  return address6 === null ? words : [...words, `dormouse.ip6=${address6}`, `dormouse.gw6=${gateway6}`];
}
