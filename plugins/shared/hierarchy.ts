import { createHash } from "node:crypto";
import { accessSync, constants, existsSync, mkdirSync, readdirSync, readFileSync } from "node:fs";
import { rmdirSync, statSync, writeFileSync } from "node:fs";
import { join, relative } from "node:path";
import process from "node:process";
import { Cgroup } from "./cgroup.ts";
import { messageOf } from "./errors.ts";

/** Holds the shims, so that what ends the host's own group, as a service manager does, leaves them alone. */
const SHIMS = "shims";

export type Controller = "memory" | "cpu" | "pids";

interface Mount {
  /** Where it is mounted. */
  point: string;
  /** What of the hierarchy is mounted there. */
  root: string;
  type: string;
  options: string[];
}

/** Stands for this one folder: a copy of it has another, so that two hosts never share processes by mistake. */
export function ownerOf(folder: string): string {
  const { dev, ino } = statSync(folder);
  return createHash("sha256").update(`${dev}:${ino}`).digest("hex").slice(0, 12);
}

/**
 * The part of the cgroup hierarchies that belongs to one data_dir: `PARENT/OWNER/` with a group for each instance. Root
 * uses the top of what is mounted; another user the group that it runs in, where that was delegated to it.
 */
export class Hierarchy {
  /** In the v2 hierarchy first, then in those v1 hierarchies whose controllers v2 does not have. */
  readonly #bases: readonly string[];
  /** The one that does nothing but divide the CPU, which an instance without such a limit need not join. */
  readonly #cpu: string | undefined;

  private constructor(bases: readonly string[], cpu: string | undefined) {
    this.#bases = bases;
    this.#cpu = cpu;
  }

  /** The hierarchy with these controllers, as far as they are there; or why it cannot be used. */
  static find(
    parent: string,
    owner: string,
    { root, controllers = ["memory", "cpu"] }: { root: boolean; controllers?: readonly Controller[] },
  ): Hierarchy | string {
    if (process.platform !== "linux") return "this is not Linux";
    if (parent === "") return "cgroup_parent is empty";
    const mounts = readMounts();
    const unified = mounts.find(({ type }) => type === "cgroup2");
    if (!unified) return "no cgroup v2 hierarchy is mounted";
    const top = root ? unified.point : join(unified.point, relative(unified.root, ownGroup()));
    const base = join(top, parent, owner);
    try {
      if (!root) accessSync(join(top, "cgroup.procs"), constants.W_OK);
      mkdirSync(base, { recursive: true });
    } catch (error) {
      return `${top} cannot be written: ${messageOf(error)}`;
    }
    if (!existsSync(join(base, "cgroup.freeze"))) return "the kernel cannot freeze a cgroup (before 5.2)";
    for (const folder of [top, join(top, parent), base]) enable(controllers, folder);
    const present = words(join(base, "cgroup.subtree_control"));
    const legacy = (controller: Controller) => {
      const mount = mounts.find(({ type, options }) => type === "cgroup" && options.includes(controller));
      const wanted = controllers.includes(controller) && !present.includes(controller);
      return root && mount && wanted ? [join(mount.point, parent, owner)] : [];
    };
    const others = [...legacy("memory"), ...legacy("pids")];
    const [cpu] = legacy("cpu");
    const bases = new Set([base, ...others, ...(cpu === undefined ? [] : [cpu])]);
    return new Hierarchy([...bases], others.includes(cpu) ? undefined : cpu);
  }

  /** The instance's group, in all hierarchies that it may be in, or with `vcpus` null in those that do more than that. */
  group(id: string, { vcpus = 1 as number | null } = {}): Cgroup {
    return new Cgroup(this.#bases.filter((base) => vcpus !== null || base !== this.#cpu).map((base) => join(base, id)));
  }

  /** The group of the shims, made if it is not there. */
  shims(): string {
    const folder = join(this.#bases[0], SHIMS);
    mkdirSync(folder, { recursive: true });
    return folder;
  }

  /** The ids of the groups that there are, in any of the hierarchies. */
  ids(): Set<string> {
    const names = this.#bases.filter((base) => existsSync(base)).flatMap((base) =>
      readdirSync(base, { withFileTypes: true }).filter((entry) => entry.isDirectory()).map(({ name }) => name)
    );
    return new Set(names.filter((name) => name !== SHIMS));
  }

  /** Removes the folders of this data_dir that hold no instance; the one above them another host may be about to use. */
  tidy(): void {
    for (const base of this.#bases) {
      for (const folder of [join(base, SHIMS), base]) {
        try {
          rmdirSync(folder);
        } catch (error) {
          const { code } = error as NodeJS.ErrnoException;
          if (!["EBUSY", "ENOTEMPTY", "ENOENT"].includes(code ?? "")) throw error;
        }
      }
    }
  }
}

/** As far as the kernel lets us: a group that holds processes of its own cannot pass its controllers on. */
function enable(controllers: readonly Controller[], folder: string): void {
  const available = words(join(folder, "cgroup.controllers"));
  const enabled = words(join(folder, "cgroup.subtree_control"));
  for (const name of controllers) {
    if (!available.includes(name) || enabled.includes(name)) continue;
    try {
      writeFileSync(join(folder, "cgroup.subtree_control"), `+${name}`);
    } catch (error) {
      const { code } = error as NodeJS.ErrnoException;
      if (!["EBUSY", "EACCES", "EPERM", "ENOENT", "EOPNOTSUPP"].includes(code ?? "")) throw error;
    }
  }
}

function words(file: string): string[] {
  return readFileSync(file, "latin1").trim().split(/\s+/);
}

/** Of this process in the v2 hierarchy: `/user.slice/...`. */
function ownGroup(): string {
  return /^0::(.*)$/m.exec(readFileSync("/proc/self/cgroup", "utf8"))?.[1] ?? "/";
}

// proc(5): id, parent, device, root, mount point, options, optional fields, "-", type, source, super options.
function readMounts(): Mount[] {
  return readFileSync("/proc/self/mountinfo", "utf8").trim().split("\n").map((line) => {
    const fields = line.split(" ");
    const [type, , options] = fields.slice(fields.indexOf("-") + 1);
    return { root: unescape(fields[3]), point: unescape(fields[4]), type, options: options.split(",") };
  });
}

function unescape(text: string): string {
  return text.replace(/\\([0-7]{3})/g, (_, octal) => String.fromCharCode(parseInt(octal, 8)));
}
