/**
 * Builds the image `demo` from Debian's packages: the smallest machine in which everything that an instance can be asked
 * for works. `guest/` holds what runs in it: HTTP on port 80, an echo on port 7, the guest agent. `GET /` answers with
 * `{ hostname, requests, uptime, clock, boots }`: requests are counted in the guest's RAM, boots on its disk (null without
 * one), uptime is in seconds, clock in milliseconds since the epoch. No root is needed, and nothing is installed.
 */
import { Buffer } from "node:buffer";
import { existsSync, readdirSync, readFileSync, realpathSync, statSync } from "node:fs";
import { chmod, cp, mkdir, mkdtemp, rename, rm, truncate, writeFile } from "node:fs/promises";
import { basename, dirname, join, resolve, sep } from "node:path";
import process from "node:process";
import type { Logger } from "@logtape/logtape";
import { stringify } from "smol-toml";
import { run } from "../shared/run.ts";
import { cpio, type CpioEntry } from "./cpio.ts";
import { elfNeeds } from "./elf.ts";
import { Packages } from "./packages.ts";

const GUEST = join(import.meta.dirname!, "guest");
const KERNEL = "linux-image-cloud-amd64";
const PACKAGES = ["busybox-static", "qemu-guest-agent", "perl-base"];
/** Of the guest, besides busybox; and what is needed of perl's own files. */
const PROGRAMS = ["qemu-ga", "perl"];
const PROGRAM_FOLDERS = ["usr/sbin", "usr/bin", "sbin", "bin"];
const PERL = "usr/lib/x86_64-linux-gnu/perl-base";
const PERL_FILES = ["strict.pm", "warnings.pm"];
/** Where Debian has libraries, before and after /lib became a link. */
const LIBRARIES = ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu", "lib64", "usr/lib64"];
/** How many steps from a program's own package the packages of its libraries may be. */
const MAX_DEPTH = 4;
/** In the order in which a guest needs them; what each depends on goes before it. Both kinds of machine are served. */
const MODULES = [
  "virtio_mmio",
  "virtio_pci",
  "virtio_net",
  "virtio_blk",
  "virtio_console",
  "virtio-rng",
  "button",
  "evdev",
  "pvpanic-mmio",
  "pvpanic-pci",
  "ext4",
];
const DISK_BYTES = 64 * 1024 * 1024;

export interface DemoOptions {
  log: Logger;
  signal?: AbortSignal;
  /** Where packages are kept for the next time; `.packages` beside the image when absent. */
  cache?: string;
}

/**
 * Makes the image's folder with `image.toml`, `vmlinuz`, `initrd.img` and `disk.raw`. It appears complete or not at all.
 *
 * @throws {Error} where the folder is there already, the machine is no x86-64, or a package cannot be fetched
 */
export async function buildDemoImage(folder: string, options: DemoOptions): Promise<void> {
  const { log, signal, cache = join(dirname(folder), ".packages") } = options;
  if (process.arch !== "x64") throw new Error(`Cannot build image "${folder}": it is for x64, this is ${process.arch}`);
  // Disks of instances are layers over the image's own: it is never made anew beneath them.
  if (existsSync(folder)) throw new Error(`Cannot build image "${folder}": it is there already`);
  await mkdir(dirname(folder), { recursive: true });
  const prefix = `.${basename(folder)}-building-`;
  await sweep(dirname(folder), prefix);
  const made = await mkdtemp(join(dirname(folder), prefix));
  try {
    const root = join(made, "root");
    const packages = new Packages(cache, { log, ...(signal && { signal }) });
    const kernel = (await packages.dependencies([KERNEL])).filter((name) => name.startsWith("linux-image-"));
    await packages.unpack([...kernel, ...PACKAGES], root);
    await unpackLibraries(packages, root);
    signal?.throwIfAborted();

    const [vmlinuz] = readdirSync(join(root, "boot")).filter((name) => name.startsWith("vmlinuz-"));
    const image = join(made, "image");
    await mkdir(image);
    await cp(join(root, "boot", vmlinuz), join(image, "vmlinuz"));
    const modules = await modulesOf(root, vmlinuz.slice("vmlinuz-".length));
    await writeFile(join(image, "initrd.img"), cpio(await initrdOf(root, modules)));
    await makeDisk(programIn(root, "busybox"), join(image, "disk.raw"));
    await writeFile(join(image, "image.toml"), stringify(DESCRIPTION));
    // Whatever this process's umask says: QEMU opens them as a user of its own.
    for (const name of readdirSync(image)) await chmod(join(image, name), 0o644);
    await rename(image, folder);
    log.info("Built image {folder} with kernel {vmlinuz}", { folder, vmlinuz });
  } finally {
    await rm(made, { recursive: true, force: true });
  }
}

/** Removes what builds that were killed have left; one that is under way is not an hour old. */
async function sweep(parent: string, prefix: string): Promise<void> {
  for (const name of readdirSync(parent).filter((each) => each.startsWith(prefix))) {
    const path = join(parent, name);
    if (Date.now() - statSync(path).ctimeMs > 3_600_000) await rm(path, { recursive: true, force: true });
  }
}

function programIn(root: string, name: string): string {
  const folder = PROGRAM_FOLDERS.find((each) => existsSync(join(root, each, name)));
  if (!folder) throw new Error(`Cannot find program "${name}" in Debian's packages`);
  return join(root, folder, name);
}

const DESCRIPTION = {
  arch: "x86_64",
  kernel: "vmlinuz",
  initrd: "initrd.img",
  // panic and reboot: a guest that ends by itself ends the program that runs it, which is told not to start it again.
  cmdline: "console=ttyS0 quiet panic=-1 reboot=t",
  vcpus: 1,
  size: "128MB",
  ready_port: 80,
  agent: true,
  dhcp: false,
  disk: { file: "disk.raw", format: "raw" },
};

/** Unpacks what the programs depend on, step by step, until every library that one of them needs is there. */
async function unpackLibraries(packages: Packages, root: string): Promise<void> {
  const seen = new Set(PACKAGES);
  let level = PACKAGES;
  for (let depth = 0; depth < MAX_DEPTH && !("found" in librariesOf(root)); depth++) {
    level = (await packages.dependencies(level)).filter((name) => !seen.has(name));
    await packages.unpack(level, root);
    for (const name of level) seen.add(name);
  }
}

/** The files of all libraries that the programs need, by the name that they are loaded by; or one that is not there. */
function librariesOf(root: string): { found: Map<string, string> } | { missing: string } {
  const found = new Map<string, string>();
  const waiting = PROGRAMS.map((name) => programIn(root, name));
  for (let file = waiting.pop(); file !== undefined; file = waiting.pop()) {
    const { interpreter, libraries } = elfNeeds(readFileSync(file));
    for (const name of [...libraries, ...(interpreter ? [basename(interpreter)] : [])]) {
      if (found.has(name)) continue;
      const folder = LIBRARIES.find((each) => existsSync(join(root, each, name)));
      if (folder === undefined) return { missing: name };
      const library = realpathSync(join(root, folder, name));
      if (!library.startsWith(resolve(root) + sep)) return { missing: name }; // a link into this machine's own files
      found.set(name, library);
      waiting.push(library);
    }
  }
  return { found };
}

/** The modules of {@linkcode MODULES} in the order to insert them, with their contents; a kernel may have some built in. */
async function modulesOf(root: string, version: string): Promise<Map<string, Buffer>> {
  const tree = ["lib/modules", "usr/lib/modules"].map((path) => join(root, path, version)).find(existsSync);
  if (!tree) throw new Error(`Cannot find the modules of kernel "${version}"`);
  const paths = new Map<string, string>();
  for (const entry of readdirSync(tree, { recursive: true, encoding: "utf8" })) {
    const [, name] = /([^/]+)\.ko(?:\.xz)?$/.exec(entry) ?? [];
    if (name) paths.set(name.replaceAll("-", "_"), join(tree, entry));
  }
  const ordered = new Map<string, Buffer>();
  const insert = async (name: string) => {
    const path = paths.get(name.replaceAll("-", "_"));
    const plain = path?.replace(/\.xz$/, "");
    if (!path || !plain || ordered.has(basename(plain))) return;
    if (path !== plain && !existsSync(plain)) await run(programIn(root, "busybox"), ["unxz", path]);
    const content = readFileSync(plain);
    // A line of the section .modinfo: what the kernel's build found it to depend on.
    const [, depends = ""] = /\0depends=([^\0]*)\0/.exec(content.toString("latin1")) ?? [];
    for (const each of depends.split(",").filter(Boolean)) await insert(each);
    ordered.set(basename(plain), content);
  };
  for (const name of MODULES) await insert(name);
  return ordered;
}

async function initrdOf(root: string, modules: Map<string, Buffer>): Promise<CpioEntry[]> {
  const libraries = librariesOf(root);
  if (!("found" in libraries)) throw new Error(`Cannot find library "${libraries.missing}" in Debian's packages`);
  const folder = (path: string): CpioEntry => ({ path, kind: "folder", mode: 0o755 });
  const link = (path: string, target: string): CpioEntry => ({ path, kind: "link", target });
  const file = (path: string, from: string, mode = 0o755): CpioEntry => (
    { path, kind: "file", mode, content: readFileSync(from) }
  );
  const busybox = programIn(root, "busybox");
  const applets = (await run(busybox, ["--list"])).split("\n").filter((name) => !["busybox", "hwclock"].includes(name));
  const perl = PERL.slice("usr/".length);
  const folders = [
    "bin",
    "data",
    "dev",
    "etc",
    "etc/acpi",
    "etc/acpi/PWRF",
    "lib",
    "lib/modules",
    "lib/x86_64-linux-gnu",
  ];
  return [
    ...[".", ...folders, perl, "proc", "run", "srv", "sys", "usr"].map(folder),
    // As a merged /usr has it: programs and scripts may name any of these.
    ...["sbin", "usr/bin", "usr/sbin"].map((path) => link(path, "/bin")),
    ...["lib64", "usr/lib"].map((path) => link(path, "/lib")),
    { path: "dev/console", kind: "character", mode: 0o600, major: 5, minor: 1 },
    link("init", "bin/busybox"),
    file("bin/busybox", busybox),
    ...applets.map((name) => link(`bin/${name}`, "busybox")),
    ...PROGRAMS.map((name) => file(`bin/${name}`, programIn(root, name))),
    ...[...libraries.found].map(([name, from]) => file(`lib/${name}`, from)),
    ...PERL_FILES.map((name) => file(`${perl}/${name}`, join(root, PERL, name), 0o644)),
    ...[...modules].map(([name, content]): CpioEntry => ({
      path: `lib/modules/${name}`,
      kind: "file",
      mode: 0o644,
      content,
    })),
    { path: "lib/modules/order", kind: "file", mode: 0o644, content: Buffer.from([...modules.keys(), ""].join("\n")) },
    ...["agent", "buttons", "dhcp", "inittab", "rc"].map((name) => file(`etc/${name}`, join(GUEST, name))),
    ...["hwclock", "shutdown"].map((name) => file(`bin/${name}`, join(GUEST, name))),
    link("etc/acpi/PWRF/00000080", "/bin/shutdown"),
    ...["run.pl", "server.pl"].map((name) => file(`srv/${name}`, join(GUEST, name), 0o644)),
  ];
}

/** A small file system of its own for what must outlive the guest's RAM. */
async function makeDisk(busybox: string, file: string): Promise<void> {
  await writeFile(file, "");
  await truncate(file, DISK_BYTES);
  await run(busybox, ["mke2fs", "-F", "-L", "demo", file]);
}
