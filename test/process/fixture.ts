import { createHash } from "node:crypto";
import { existsSync, readdirSync, readFileSync, readlinkSync, statSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import type { TestContext } from "node:test";
import { createId } from "@paralleldrive/cuid2";
import { getLogger } from "@logtape/logtape";
import type { Instance, Network } from "../../main.ts";
import { BLANK } from "../../plugins/hypervisor/records.ts";
import { ProcessDriver, type ProcessOptions } from "../../plugins/process/driver.ts";
import { isAlive, processes, type ProcessId } from "../../plugins/shared/proc.ts";
import { argumentsOf, cleanup, temporaryFolder } from "../helpers.ts";
import type { DriverFixture } from "../contract/driver.ts";

export const PATH = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin";
/** Root tests cgroups under a name of its own. */
export const CGROUP_PARENT = "dormouse-test";
export const OPTIONS: ProcessOptions = {
  grace: 10_000,
  log_max_size: 1 << 20,
  log_files: 2,
  cgroup_parent: CGROUP_PARENT,
  path: PATH,
};
export const IS_ROOT = process.getuid?.() === 0;
export const NEEDS_ROOT = IS_ROOT ? null : "it needs root";

/** Counts up, ten times in the time of a blink. */
const COUNTING = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.03; done";

/** An instance of the `process` driver as the registry would hand it over. */
export function instanceOf(script: string | string[], change: Partial<Instance> = {}): Instance {
  const id = createId();
  const cmd = typeof script === "string" ? ["sh", "-c", script] : script;
  return { ...BLANK, id, name: `test-${id}`, driver: "process", image: "host", cmd, revision: 1, ...change };
}

/** Drivers on one data_dir, and what they leave on this machine. All that they started is gone after the test. */
export class ProcessFixture implements DriverFixture {
  readonly dataDir: string;
  readonly #options: ProcessOptions;
  readonly #network: Network | undefined;
  readonly #waiting = new Map<string, (() => void)[]>();
  readonly #opened: ProcessDriver[] = [];
  readonly #seen = new Set<ProcessId>();

  constructor(t: TestContext, options: Partial<ProcessOptions> & { network?: Network } = {}) {
    const { network, ...rest } = options;
    this.dataDir = temporaryFolder(t);
    this.#options = { ...OPTIONS, ...rest };
    this.#network = network;
    cleanup(t).defer(async () => {
      const last = this.open();
      await last.sweep(new Set());
      for (const driver of this.#opened) await driver[Symbol.asyncDispose]();
    });
  }

  open(): ProcessDriver {
    const changed = (id: string) => {
      for (const resolve of this.#waiting.get(id)?.splice(0) ?? []) resolve();
    };
    const { dataDir } = this;
    const log = getLogger(["dormouse", "process"]);
    const driver = new ProcessDriver({ dataDir, network: this.#network, log, changed, options: this.#options });
    this.#opened.push(driver);
    return driver;
  }

  counting = () => instanceOf(COUNTING);
  stubborn = () => instanceOf(`trap '' TERM; ${COUNTING}`);
  ending = (code: number) => instanceOf(`exit ${code}`);

  invalid(): Record<string, Instance> {
    return {
      "image of another kind": instanceOf("true", { image: "docker.io/library/nginx" }),
      "image of a missing directory": instanceOf("true", { image: "dir:/no/such/directory" }),
      "nothing to run": instanceOf([]),
      "missing program": instanceOf(["no-such-program"]),
      "missing path": instanceOf(["/no/such/program"]),
      "not executable": instanceOf(["/etc/passwd"]),
      "a directory": instanceOf(["/etc"]),
      "missing working_dir": instanceOf("true", { working_dir: "/no/such/directory" }),
      "relative working_dir": instanceOf("true", { working_dir: "tmp" }),
      "unknown user": instanceOf("true", { run_as: "no-such-user" }),
      "unknown group": instanceOf("true", { run_as: "root:no-such-group" }),
      "malformed user": instanceOf("true", { run_as: "1:2:3" }),
    };
  }

  async count(instance: Instance): Promise<number> {
    this.#note(instance);
    const file = join(this.folder(instance), "app.log");
    if (!existsSync(file)) return 0;
    return Number(readFileSync(file, "utf8").trim().split("\n").at(-1));
  }

  changed({ id }: Instance): Promise<void> {
    return new Promise((resolve) => {
      this.#waiting.set(id, [...this.#waiting.get(id) ?? [], resolve]);
    });
  }

  blind(instance: Instance): void {
    this.#note(instance);
    writeFileSync(join(this.folder(instance), "run", "launch"), "not a launch\n{");
  }

  remains(instance: Instance): string[] {
    const files = [this.folder(instance)].filter((file) => existsSync(file));
    const exits = readdirSync(join(this.dataDir, "process", "exits")).filter((name) => name.startsWith(instance.id));
    const alive = [...this.#seen].filter(isAlive).map(({ pid }) => `process ${pid}`);
    return [...files, ...exits, ...alive, ...this.cgroups(instance)];
  }

  folder({ id }: Instance): string {
    return join(this.dataDir, "process", "instances", id);
  }

  /** The instance's cgroups of every hierarchy. */
  cgroups({ id }: Instance): string[] {
    const { dev, ino } = statSync(join(this.dataDir, "process", "instances"));
    const owner = createHash("sha256").update(`${dev}:${ino}`).digest("hex").slice(0, 12);
    const mounts = readFileSync("/proc/self/mountinfo", "utf8").split("\n").filter((line) => / - cgroup2? /.test(line));
    return mounts.map((line) => join(line.split(" ")[4], CGROUP_PARENT, owner, id)).filter((path) => existsSync(path));
  }

  /** Remembers the instance's processes, to know later whether they are gone. */
  #note(instance: Instance): void {
    for (const each of processesOf(instance)) this.#seen.add(each);
  }
}

/** The processes that hold the instance's log open: all that it started, in whatever session they are. */
export function processesOf({ id }: Instance): ProcessId[] {
  return processes().filter(({ pid }) => {
    try {
      return argumentsOf(pid).includes(id) || readlinkSync(`/proc/${pid}/fd/1`).includes(`/${id}/`);
    } catch (error) {
      const { code } = error as NodeJS.ErrnoException;
      if (["ENOENT", "ESRCH", "EACCES"].includes(code ?? "")) return false;
      throw error;
    }
  });
}
