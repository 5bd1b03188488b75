import { accessSync, constants, existsSync, mkdirSync, readFileSync, renameSync, writeFileSync } from "node:fs";
import { release } from "node:os";
import { dirname } from "node:path";
import type { Logger } from "@logtape/logtape";
import { messageOf } from "../shared/errors.ts";
import { run } from "../shared/run.ts";
import type { Image } from "./images.ts";
import type { Accel } from "./machine.ts";

/** Milliseconds in which a kernel gets as far as to find no root; under KVM it takes a second. */
const PROBE_MS = 15_000;

/**
 * Which accelerator this machine has. That /dev/kvm opens is no proof: on some machines a guest hangs as soon as it runs.
 * So a guest is booted once, and what came of it is remembered for as long as the kernel is the same.
 */
export class Accelerator {
  readonly #wanted: Accel | "auto";
  readonly #file: string;
  readonly #log: Logger;
  #found: Promise<Accel> | undefined;

  /** `file` is where the answer is kept. */
  constructor(wanted: Accel | "auto", file: string, log: Logger) {
    this.#wanted = wanted;
    this.#file = file;
    this.#log = log;
  }

  /** Where nobody has booted a guest yet, by booting this image's kernel. */
  async of(image: Image): Promise<Accel> {
    if (this.#wanted !== "auto") return this.#wanted;
    return await (this.#found ??= this.#find(image));
  }

  async #find(image: Image): Promise<Accel> {
    const kernel = release();
    const kept = existsSync(this.#file) ? JSON.parse(readFileSync(this.#file, "utf8")) : {};
    if (kept.kernel === kernel && (kept.accel === "kvm" || kept.accel === "tcg")) return kept.accel;
    const reason = lacksKvm() ?? await probe(image);
    const accel = reason === null ? "kvm" : "tcg";
    if (reason !== null) this.#log.warn("Machines are emulated, which is slow: {reason}", { reason });
    mkdirSync(dirname(this.#file), { recursive: true });
    writeFileSync(`${this.#file}.tmp`, JSON.stringify({ kernel, accel }));
    renameSync(`${this.#file}.tmp`, this.#file);
    return accel;
  }
}

function lacksKvm(): string | null {
  try {
    accessSync("/dev/kvm", constants.R_OK | constants.W_OK);
    return null;
  } catch (error) {
    return `no KVM: ${messageOf(error)}`;
  }
}

/** Why a kernel does not run under KVM, or null: without a root it panics, which ends QEMU. */
async function probe({ kernel }: Image): Promise<string | null> {
  const machine = ["-M", "microvm,accel=kvm", "-cpu", "host", "-m", "128M", "-nodefaults", "-display", "none"];
  const args = [...machine, "-no-reboot", "-kernel", kernel, "-append", "panic=-1 reboot=t quiet"];
  try {
    await run("qemu-system-x86_64", args, { timeout: PROBE_MS });
    return null;
  } catch (error) {
    return `a guest does not run under KVM: ${messageOf(error)}`;
  }
}
