/**
 * Instances that are virtual machines, run by QEMU. `machine.ts` makes QEMU's command line and `launch.ts` starts it;
 * `records.ts` is what is kept on disk, `vm.ts` one machine made of it, `snapshot.ts` its sleep. `fleet.ts` has all
 * machines, `power.ts` brings them up, with `wire.ts`, `disk.ts`, `ready.ts` and `slots.ts`, and `driver.ts` is the
 * driver. `qmp.ts` speaks with QEMU, `agent.ts`, `exec.ts` and `tasks.ts` with the guest, both by `socket.ts`.
 * `images.ts` and `image-routes.ts` are the images, `demo.ts` builds one of them, with `packages.ts`, `cpio.ts` and
 * `elf.ts`. `accel.ts` finds out whether KVM works, `clock.ts` what guests without it are told.
 */
import { accessSync, constants, existsSync } from "node:fs";
import { isAbsolute, join } from "node:path";
import process from "node:process";
import * as v from "valibot";
import { definePlugin } from "../../main.ts";
import { messageOf } from "../shared/errors.ts";
import { resolveIdentity } from "../shared/identity.ts";
import { duration, size } from "../shared/schemas.ts";
import { Accelerator } from "./accel.ts";
import { buildDemoImage } from "./demo.ts";
import { QemuDriver } from "./driver.ts";
import { Fleet } from "./fleet.ts";
import { imageRoutes } from "./image-routes.ts";
import { Images, imagesFolder } from "./images.ts";
import { type DriverName, MACHINES } from "./machine.ts";
import type { Owner } from "./records.ts";

const DRIVERS = Object.keys(MACHINES) as DriverName[];
const PROGRAMS = ["qemu-system-x86_64", "qemu-img"];

const Whole = v.pipe(v.number(), v.integer());
const Options = v.object({
  /** `auto` uses KVM where a guest really runs under it. */
  accel: v.optional(v.picklist(["auto", "kvm", "tcg"]), "auto"),
  /** The user that QEMU runs as where the host is root, as "user" or "user:group"; empty to stay root. */
  run_as: v.optional(v.string(), "nobody"),
  /** Where the memory of machines is kept, by default with their other files: a file system that can hold it. */
  ram_dir: v.optional(
    v.pipe(v.string(), v.check((path) => path === "" || isAbsolute(path), "expected an absolute path")),
    "",
  ),
  /** From the request to shut down to the end. */
  grace: v.optional(duration(), "10s"),
  /** In which QEMU itself must answer; a guest may take as long as it likes. */
  start_timeout: v.optional(duration({ min: 1 }), "15s"),
  max_concurrent_restores: v.optional(v.pipe(Whole, v.minValue(1), v.maxValue(1000)), 4),
  /** From which size the log of a console is rotated, and how many rotated files are kept. */
  log_max_size: v.optional(size({ min: 65_536 }), "8MB"),
  log_files: v.optional(v.pipe(Whole, v.minValue(0), v.maxValue(100)), 3),
});

export default definePlugin({
  name: "qemu",
  requires: ["hypervisor", "network?", "api?"],
  options: Options,
  commands: {
    "image-demo": {
      help: 'builds the image "demo" from packages of Debian, then exits',
      run: ({ dataDir, log, signal }) => buildDemoImage(join(imagesFolder(dataDir), "demo"), { log, signal }),
    },
  },
  async setup({ dataDir, log, hooks, use, find, defer }, { accel, run_as, ...options }) {
    const hypervisor = use("hypervisor");
    const api = find("api");
    const images = new Images(imagesFolder(dataDir));
    const owner = await ownerOf(run_as);
    const fleet = new Fleet({
      dataDir,
      network: find("network"),
      images,
      accelerator: new Accelerator(accel, join(dataDir, "qemu", "accel.json"), log),
      log,
      options,
      owner,
      lacking: lacking(owner === null ? PROGRAMS : [...PROGRAMS, "setpriv"]),
      changed: (id, cause) => hypervisor.changed(id, cause),
    });
    defer(() => fleet[Symbol.asyncDispose]());
    for (const name of DRIVERS) {
      const registration = hypervisor.register(new QemuDriver(name, fleet));
      defer(() => registration[Symbol.dispose]());
    }
    // What becomes of an instance that cannot be restored: it stays asleep, or loses its memory and starts anew.
    const fallback = hypervisor.extend({ field: "restore_fallback", schema: v.picklist(["none", "start"]) });
    defer(() => fallback[Symbol.dispose]());
    const instances = () => hypervisor.list().filter(({ driver }) => DRIVERS.some((name) => name === driver));
    if (api) imageRoutes(api, { images, instances });
    // After the registry has adopted what is its own.
    hooks.guard("host:ready", async () => {
      const strays = await fleet.sweep(new Set(hypervisor.list().map(({ id }) => id)));
      if (strays.length > 0) log.info("Removed what belonged to no instance: {strays}", { strays: strays.join(", ") });
    }, { priority: 50, timeout: 60_000 });
  },
});

/** Whom QEMU runs as, where that is not the host's own user. */
async function ownerOf(run_as: string): Promise<Owner | null> {
  if (process.getuid?.() !== 0 || run_as === "") return null;
  try {
    return await resolveIdentity(run_as);
  } catch (error) {
    throw new Error(`Wrong value of "run_as": ${messageOf(error)}`, { cause: error });
  }
}

function lacking(programs: readonly string[]): string | null {
  if (process.platform !== "linux") return `it needs Linux, this is ${process.platform}`;
  const folders = (process.env.PATH ?? "").split(":").filter(Boolean);
  const missing = programs.find((name) => !folders.some((folder) => isProgram(join(folder, name))));
  return missing === undefined ? null : `program "${missing}" is not in PATH`;
}

function isProgram(file: string): boolean {
  if (!existsSync(file)) return false;
  try {
    accessSync(file, constants.X_OK);
    return true;
  } catch {
    return false; // somebody else's
  }
}
