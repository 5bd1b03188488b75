/** Machines of the driver whose changes are timed, and what they are compared with. */
import { readFileSync, rmSync, statSync, truncateSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import type { Instance } from "../../main.ts";
import type { QemuDriver } from "../../plugins/qemu/driver.ts";
import type { Image } from "../../plugins/qemu/image.ts";
import { Qmp } from "../../plugins/qemu/qmp.ts";
import type { Records } from "../../plugins/qemu/records.ts";
import { delay } from "../../plugins/shared/async.ts";
import type { QemuFixture } from "./fixture.ts";
import { Plain } from "./plain.ts";

const MIB = 2 ** 20;
/** Milliseconds for which a guest has nothing to do before it is put to sleep. */
const IDLE_MS = 200;

/** Random bytes in files in the guest's memory; no page is like another, for each file begins elsewhere in its pages. */
const FILL = `
open(R, "<", "/dev/urandom"); sysread(R, $seed, 1 << 20) == 1 << 20 or die;
$bytes .= $seed ^ (pack("N", $_) x (1 << 18)) for 1 .. 8;
for $i (1 .. $ARGV[0]) {
  open(F, ">", "/run/$i") or die; syswrite(F, "x" x (4 * $i)); syswrite(F, $bytes) == 1 << 23 or die "$!"; close F;
}`;

/** When QEMU has last answered each command of this process. */
const answered = new Map<string, number>();
const { execute } = Qmp.prototype;
Qmp.prototype.execute = async function (command, ...rest) {
  const result = await execute.call(this, command, ...rest);
  answered.set(command, performance.now());
  return result;
};

/** Milliseconds that it takes. @throws as it does, and the signal's reason */
export async function timed(signal: AbortSignal, work: () => Promise<unknown>): Promise<number> {
  signal.throwIfAborted();
  const begin = performance.now();
  await work();
  return performance.now() - begin;
}

/** Milliseconds; of a restore to where QEMU answers, the guest goes on, and it is `Running`. */
export interface Cycle {
  standby: number;
  monitor: number;
  cont: number;
  running: number;
}

export interface MachineContext {
  readonly fixture: QemuFixture;
  readonly driver: QemuDriver;
  readonly image: Image;
  /** For files of what is compared. */
  readonly folder: string;
  readonly signal: AbortSignal;
}

/** A machine of the driver, which runs what its image does. */
export class Machine {
  readonly mib: number;
  readonly instance: Instance;
  /** Milliseconds from nothing to `Running`. */
  boot = 0;
  readonly #context: MachineContext;

  constructor(context: MachineContext, mib: number) {
    this.#context = context;
    this.mib = mib;
    this.instance = context.fixture.instance(undefined, { memory_bytes: mib * MIB });
  }

  /** One of the same kind that is not there yet. */
  sibling(): Machine {
    return new Machine(this.#context, this.mib);
  }

  /** Boots it, and fills half of its memory with what is not zero and cannot be made smaller. */
  async begin(): Promise<void> {
    const { instance } = this;
    const { driver, signal } = this.#context;
    this.boot = await timed(signal, async () => {
      await driver.create(instance);
      await driver.start(instance, signal);
      while ((await driver.inspect(instance)).state !== "Running") await delay(10, { signal });
    });
    const command = ["perl", "-e", FILL, String(this.mib / 2 / 8)];
    const options = { timeout_ms: 120_000, max_output: 1_000, signal };
    const { exit_code, stderr } = await driver.exec(instance, { command, ...options });
    if (exit_code !== 0) throw new Error(`Cannot fill the guest's memory: ${stderr}`);
  }

  standby(): Promise<number> {
    const { driver, signal } = this.#context;
    return timed(signal, () => driver.standby(this.instance, signal));
  }

  async restore(): Promise<void> {
    const { driver, signal } = this.#context;
    const state = await driver.restore(this.instance, signal);
    if (state !== "Running") throw new Error(`it is ${state} after its restore`);
  }

  /** A standby, what is to be done in its sleep, and a restore; no other machine may be spoken with meanwhile. */
  async cycle(asleep: () => Promise<unknown> = async () => {}): Promise<Cycle> {
    await this.#idle();
    const standby = await this.standby();
    await asleep();
    const begin = performance.now();
    const running = await timed(this.#context.signal, () => this.restore());
    const since = (command: string) => answered.get(command)! - begin;
    return { standby, running, monitor: since("qmp_capabilities"), cont: since("cont") };
  }

  /** Makes `target` a copy of it that is asleep, as it is. */
  async fork(target: Machine): Promise<void> {
    await this.#context.driver.fork(this.instance, target.instance);
  }

  async remove(): Promise<void> {
    await this.#context.driver.delete(this.instance);
  }

  /** What is left of it, and of others that were measured. */
  remains(): string[] {
    return this.#context.fixture.remains(this.instance);
  }

  /** Bytes of memory of its QEMU: all, where what is shared counts in part, and what nobody else has. */
  pss(): { all: number; own: number } {
    const { pid } = this.#context.fixture.process(this.instance)!;
    const text = readFileSync(`/proc/${pid}/smaps_rollup`, "latin1");
    const bytes = (key: string) => Number(new RegExp(`^${key}:\\s+(\\d+) kB`, "m").exec(text)![1]) * 1024;
    return { all: bytes("Pss"), own: bytes("Private_Clean") + bytes("Private_Dirty") };
  }

  /** Of its device state, while it sleeps. */
  stateBytes(): number {
    return statSync(this.#records.path("state")).size;
  }

  /** Milliseconds of a start of QEMU that has nothing from it but the command line. */
  async bare(): Promise<number> {
    const { folder, signal } = this.#context;
    const ram = join(folder, "ram");
    writeFileSync(ram, "");
    truncateSync(ram, this.mib * MIB);
    await using qemu = this.#plain(`memory-backend-file,mem-path=${ram},share=on`);
    return await timed(signal, async () => {
      await qemu.start();
      await qemu.untilRunning();
    });
  }

  /**
   * Has the guest, which sleeps, put to sleep and woken by a full copy of its memory; what the driver has of it stays as
   * it is. Milliseconds to the end of QEMU, and from its start to where the guest goes on; bytes of the state.
   */
  async copy(): Promise<{ standby: number; cont: number; bytes: number }> {
    const { folder, signal } = this.#context;
    const state = join(folder, "state");
    try {
      let standby: number;
      {
        await using qemu = this.#plain(`memory-backend-file,mem-path=${this.#records.ram},share=off`, {
          incoming: true,
        });
        await qemu.start();
        await qemu.load(this.#records.path("state"), { shared: true });
        standby = await timed(signal, () => qemu.save(state));
      }
      await using qemu = this.#plain("memory-backend-ram", { incoming: true });
      const cont = await timed(signal, async () => {
        await qemu.start();
        await qemu.load(state);
      });
      await qemu.answers();
      const bytes = statSync(state).size;
      if (bytes < this.mib * MIB / 2) throw new Error(`less than half of the memory is in use: ${bytes} bytes`);
      return { standby, cont, bytes };
    } finally {
      rmSync(state, { force: true });
    }
  }

  /** Machines go to sleep when there is nothing to do; the work of the restore before is to be over. */
  async #idle(): Promise<void> {
    const { fixture, signal } = this.#context;
    while (fixture.fleet!.isWatched(this.instance.id)) await delay(10, { signal });
    await delay(IDLE_MS, { signal });
  }

  #plain(memory: string, { incoming = false } = {}): Plain {
    const { folder, image, signal } = this.#context;
    return new Plain({ records: this.#records, image, folder: join(folder, "plain"), memory, incoming, signal });
  }

  get #records(): Records {
    return this.#context.fixture.records(this.instance);
  }
}
