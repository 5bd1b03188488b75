/** Machines of the driver on a data_dir, for the contract and for what is the driver's own. */
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import type { TestContext } from "node:test";
import { getLogger } from "@logtape/logtape";
import { createId } from "@paralleldrive/cuid2";
import type { Instance } from "../../main.ts";
import { BLANK } from "../../plugins/hypervisor/records.ts";
import { Accelerator } from "../../plugins/qemu/accel.ts";
import { QemuDriver } from "../../plugins/qemu/driver.ts";
import { Fleet, type FleetOptions } from "../../plugins/qemu/fleet.ts";
import { Images } from "../../plugins/qemu/images.ts";
import type { DriverName } from "../../plugins/qemu/machine.ts";
import { Records } from "../../plugins/qemu/records.ts";
import { isAlive, type ProcessId } from "../../plugins/shared/proc.ts";
import { missingProgram } from "../../plugins/shared/programs.ts";
import type { DriverFixture } from "../contract/driver.ts";
import { cleanup, temporaryFolder, until } from "../helpers.ts";

export const OPTIONS: FleetOptions = {
  grace: 15_000,
  start_timeout: 30_000,
  boot_timeout: 900_000,
  cgroup_parent: "dormouse-test",
  max_concurrent_restores: 4,
  ram_dir: "",
  log_max_size: 1 << 20,
  log_files: 2,
};
/** Root has QEMU run as nobody. */
const OWNER = process.getuid?.() === 0 ? { uid: 65_534, gid: 65_534 } : null;
/** Milliseconds in which a machine that counts ten times a second counts once. */
const STILL_MS = 20_000;
const COUNTING = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.1; done";

/** What the drivers of a host on this data_dir share. */
export function fleetOf(
  dataDir: string,
  options = OPTIONS,
  changed: (id: string) => void = () => {},
  closing = new AbortController().signal,
): Fleet {
  const log = getLogger(["dormouse", "qemu"]);
  const images = new Images(join(dataDir, "images"), OWNER);
  const accelerator = new Accelerator("tcg", join(dataDir, "accel.json"), log);
  return new Fleet({
    dataDir,
    network: undefined,
    images,
    accelerator,
    log,
    options,
    owner: OWNER,
    lacking: null,
    closing,
    missing: missingProgram,
    changed,
    lost: ({ name }, reason) => log.warn("Lost the memory of {name}: {reason}", { name, reason }),
  });
}

/** Drivers on one data_dir, and what they leave on this machine. All that they started is gone after the test. */
export class QemuFixture implements DriverFixture {
  readonly dataDir: string;
  /** Of the host that is there now. */
  fleet: Fleet | undefined;
  /** That one is about to close. */
  closing = new AbortController();
  readonly #name: DriverName;
  readonly #image: string;
  readonly #options: FleetOptions;
  readonly #waiting = new Map<string, (() => void)[]>();
  readonly #closed: Promise<void>[] = [];
  readonly #seen = new Set<ProcessId>();
  /** What was last counted, and since when nothing else. */
  readonly #counted = new Map<string, { count: number; at: number }>();

  /** `image` is the folder of the image `demo`. */
  constructor(t: TestContext, name: DriverName, image: string, options: Partial<FleetOptions> = {}) {
    this.dataDir = temporaryFolder(t);
    this.#name = name;
    this.#image = image;
    this.#options = { ...OPTIONS, ...options };
    cleanup(t).defer(async () => {
      this.open();
      await this.fleet!.sweep(new Set());
      await this.fleet![Symbol.asyncDispose]();
      await Promise.all(this.#closed);
    });
  }

  open(): QemuDriver {
    // As the kernel closes the connections of a host that was killed: QEMU speaks with one at a time.
    if (this.fleet) this.#closed.push(this.fleet[Symbol.asyncDispose]());
    this.closing = new AbortController();
    this.fleet = fleetOf(this.dataDir, this.#options, (id) => {
      for (const resolve of this.#waiting.get(id)?.splice(0) ?? []) resolve();
    }, this.closing.signal);
    return new QemuDriver(this.#name, this.fleet);
  }

  /** Lets go of everything, as for a host that is another process. */
  async close(): Promise<void> {
    await this.fleet?.[Symbol.asyncDispose]();
    this.fleet = undefined;
  }

  /** Makes an instance and starts it; resolves when it runs. */
  async start(driver: QemuDriver, instance: Instance): Promise<void> {
    await driver.create(instance);
    await driver.start(instance, new AbortController().signal);
    await until("it runs", async () => (await driver.inspect(instance)).state === "Running", 180_000);
  }

  counting = () => this.instance(COUNTING);
  /** What the guest agent and the power button call does nothing. */
  stubborn = () => this.instance(`echo : >/bin/shutdown; ${COUNTING}`);
  ending = (code: number) => this.instance(`exit ${code}`);

  invalid(): Record<string, Instance> {
    return {
      "an image that is not there": this.instance("true", { image: "no-such-image" }),
      "a folder that is none": this.instance("true", { image: "/no/such/folder" }),
      "a folder without an image": this.instance("true", { image: "/etc" }),
      "a name that is a path": this.instance("true", { image: "../images/demo" }),
      "a user of this machine": this.instance("true", { run_as: "nobody" }),
      "more vcpus than QEMU gives": this.instance("true", { vcpus: 256 }),
      "less of a disk than its image has": this.instance("true", { hints: { overlay_size: "1MB" } }),
      "less memory than a kernel needs": this.instance("true", { memory_bytes: 1024 * 1024 }),
      "more memory than a machine can have": this.instance("true", { memory_bytes: 2 ** 50 }),
      "more than a kernel can be told": this.instance("true", { env: { LONG: "x".repeat(2_000) } }),
    };
  }

  /** An instance that runs a script of its shell, or what its image does. */
  instance(script?: string, change: Partial<Instance> = {}): Instance {
    const id = createId();
    const cmd = script === undefined ? [] : ["sh", "-c", script];
    const given = { id, name: `test-${id}`, driver: this.#name, image: this.#image, cmd };
    return { ...BLANK, ...given, revision: 1, ...change };
  }

  async count(instance: Instance): Promise<number> {
    this.process(instance);
    const { log } = this.records(instance);
    if (!existsSync(log)) return 0;
    // The kernel and init speak on the console too.
    const count = Number(readFileSync(log, "latin1").match(/^\d+(?=\r?\n)/gm)?.at(-1) ?? 0);
    await this.#speakToStill(instance, count);
    return count;
  }

  /**
   * Seen once in thousands of boots: an emulated machine that answers and whose timers do not ring. QEMU's or the guest's
   * it may be, and no driver's; an interrupt of another kind may wake it. Told, so that more becomes known of it.
   */
  async #speakToStill({ id, name }: Instance, count: number): Promise<void> {
    const [now, before] = [performance.now(), this.#counted.get(id)];
    if (before?.count === count && now - before.at < STILL_MS) return;
    this.#counted.set(id, { count, at: now });
    const agent = this.fleet?.vm(id).link?.agent;
    if (before?.count !== count || !agent) return;
    const said = await agent.ping({ timeout: 5_000 }).then(() => "its agent answers", String);
    console.log(`seen: ${name} counts no further than ${count} in ${STILL_MS} ms; ${said}`);
  }

  changed({ id }: Instance): Promise<void> {
    return new Promise((resolve) => {
      this.#waiting.set(id, [...this.#waiting.get(id) ?? [], resolve]);
    });
  }

  /** S2: it is there and does not answer. */
  blind(instance: Instance): void {
    process.kill(this.process(instance)!.pid, "SIGSTOP");
  }

  remains(instance: Instance): string[] {
    const files = [this.records(instance).folder].filter((file) => existsSync(file));
    return [...files, ...[...this.#seen].filter(isAlive).map(({ pid }) => `process ${pid}`)];
  }

  /** Its QEMU, remembered to know later whether it is gone. */
  process(instance: Instance): ProcessId | undefined {
    const records = this.records(instance);
    const launch = records.launch();
    const main = launch && records.processOf(launch);
    if (main) this.#seen.add(main);
    return main;
  }

  records({ id }: Instance): Records {
    return new Records(join(this.dataDir, "qemu", "instances", id));
  }
}
