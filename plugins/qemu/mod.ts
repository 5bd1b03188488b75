/**
 * Instances that are virtual machines, run by QEMU. `machine.ts` makes QEMU's command line and `launch.ts` starts it;
 * `records.ts` is what is kept on disk, `vm.ts` one machine made of it, `snapshot.ts` its sleep, `asleep.ts` what becomes
 * of its memory meanwhile, with `memory.ts`, `compress.ts` and `snapshot-policy.ts`. `fleet.ts` has all machines,
 * `power.ts` brings them up, and `waking.ts` those that sleep, with `wire.ts`, `disk.ts`, `ready.ts` and `slots.ts`;
 * `driver.ts` is the driver, `fork.ts` makes copies. `limits.ts` has their cgroups, `dhcp.ts` gives addresses to those that ask, with
 * `dnsmasq.ts`. `qmp.ts` speaks with QEMU, `agent.ts`, `exec.ts` and `tasks.ts` with the guest, both by `socket.ts`.
 * `images.ts`, `image.ts` and `image-routes.ts` are the images, `demo.ts` builds one of them, with `packages.ts`,
 * `cpio.ts` and `elf.ts`. `accel.ts` finds out whether KVM works, `clock.ts` what guests without it are told.
 */
import { mkdir } from "node:fs/promises";
import { isAbsolute, join } from "node:path";
import process from "node:process";
import * as v from "valibot";
import { definePlugin, type Instance } from "../../main.ts";
import { messageOf } from "../shared/errors.ts";
import { resolveIdentity } from "../shared/identity.ts";
import { missingProgram } from "../shared/programs.ts";
import { about, duration, size } from "../shared/schemas.ts";
import { Accelerator } from "./accel.ts";
import { putAway } from "./asleep.ts";
import { lacksCompression } from "./compress.ts";
import { buildDemoImage } from "./demo.ts";
import { QemuDriver } from "./driver.ts";
import { Fleet } from "./fleet.ts";
import { imageRoutes } from "./image-routes.ts";
import { DEMO, Images, imagesFolder } from "./images.ts";
import { type DriverName, MACHINES } from "./machine.ts";
import type { Owner } from "./records.ts";
import { type Means, normalise, planOf, SnapshotPolicy } from "./snapshot-policy.ts";

const DRIVERS = Object.keys(MACHINES) as DriverName[];
/** The note of memory that is gone, which nobody asked for. */
const LOST = "qemu:memory_lost";
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
  /** In which QEMU itself must answer; its guest has `boot_timeout`. */
  start_timeout: v.optional(duration({ min: 1 }), "15s"),
  /** In which a guest must be ready after its start, or it is ended; "0" to wait for as long as it takes. */
  boot_timeout: v.optional(duration(), "5m"),
  /**
   * The cgroup that holds those of all machines, empty to do without. A machine may use its memory and what QEMU needs
   * itself: 96 MiB, 8 MiB a vcpu, 1/64 of its memory and without KVM 256 MiB; half a CPU more than its vcpus; 128 threads.
   */
  cgroup_parent: v.optional(v.pipe(v.string(), v.regex(/^[\w-]*$/, "use letters, digits, _ and -")), "dormouse"),
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
      alone: true,
      run: async ({ dataDir, log, signal }) => {
        await mkdir(dataDir, { recursive: true, mode: 0o700 }); // as the store would make it
        await buildDemoImage(join(imagesFolder(dataDir), DEMO), { log, signal });
      },
    },
  },
  async setup({ dataDir, log, signal: closing, hooks, use, find, defer }, { accel, run_as, ...options }) {
    const hypervisor = use("hypervisor");
    const api = find("api");
    const owner = await ownerOf(run_as);
    const images = new Images(imagesFolder(dataDir), owner);
    const notes = hypervisor.declareNotes({
      [LOST]: { help: "An instance could not be restored, and was started or stopped without its memory" },
    });
    defer(() => notes[Symbol.dispose]());
    const fleet = new Fleet({
      dataDir,
      network: find("network"),
      images,
      accelerator: new Accelerator(accel, join(dataDir, "qemu", "accel.json"), log, { owner }),
      log,
      options,
      owner,
      closing,
      missing: missingProgram,
      lacking: lacking(owner === null ? PROGRAMS : [...PROGRAMS, "setpriv"]),
      changed: (id, cause) => hypervisor.changed(id, cause),
      lost({ id, name }, reason) {
        log.warn("The memory of {name} is lost, it could not be restored: {reason}", { name, reason });
        try {
          hypervisor.note(id, {
            type: LOST,
            origin: { actor: "qemu", cause: "restore_failed" },
            summary: `"${name}" has lost its memory, as it could not be restored: ${reason}`,
            detail: { error: reason },
          });
        } catch (error) {
          log.error("That {name} has lost its memory could not be noted: {reason}", {
            name,
            reason: messageOf(error),
            error,
          });
        }
      },
    });
    defer(() => fleet[Symbol.asyncDispose]());
    const registrations = DRIVERS.map((name) => hypervisor.register(new QemuDriver(name, fleet)));
    defer(async () => void await Promise.all(registrations.map((each) => each[Symbol.asyncDispose]())));
    // What becomes of an instance that cannot be restored: it stays asleep, or loses its memory and starts anew.
    const fallback = hypervisor.extend({
      field: "restore_fallback",
      schema: about(
        'When it cannot wake: "none" lets it sleep on, "start" boots it anew, without its memory',
        v.picklist(["none", "start"]),
      ),
    });
    defer(() => fallback[Symbol.dispose]());
    const [zstd, lz4] = await Promise.all([lacksCompression("zstd"), lacksCompression("lz4")]);
    const means: Means = { zstd, lz4 };
    const compression = hypervisor.extend({
      field: "snapshot_policy",
      code: "invalid_snapshot_policy",
      schema: about("What becomes of its memory while it sleeps", SnapshotPolicy),
      normalise: (policy, instance) => normalise(policy, instance, means),
    });
    defer(() => compression[Symbol.dispose]());
    const isOurs = ({ driver }: Instance) => DRIVERS.some((name) => name === driver);
    hooks.on("instance:event", async ({ action, detail, instance: { id } }) => {
      if (action !== "update" || !(detail.fields as string[]).includes("snapshot_policy")) return;
      const instance = hypervisor.find(id);
      if (!instance || !isOurs(instance)) return;
      await fleet.turn(id, async ({ records }) => {
        await records.amend({ plan: planOf(instance) });
        putAway(fleet, instance);
      });
    });
    const instances = () => hypervisor.list().filter(isOurs);
    await images.sweep(); // nobody can ask for one yet
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
  const missing = missingProgram(programs);
  return missing === undefined ? null : `program "${missing}" is not in PATH`;
}
