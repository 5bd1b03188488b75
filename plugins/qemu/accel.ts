import { accessSync, constants, existsSync, mkdirSync, readFileSync, renameSync, writeFileSync } from "node:fs";
import { cpus, release } from "node:os";
import { dirname } from "node:path";
import process from "node:process";
import type { Logger } from "@logtape/logtape";
import * as v from "valibot";
import { deadline } from "../shared/async.ts";
import { messageOf } from "../shared/errors.ts";
import { CommandError, run } from "../shared/run.ts";
import type { Image } from "./image.ts";
import { lowered } from "./launch.ts";
import type { Accel } from "./machine.ts";
import type { Owner } from "./records.ts";

/** Milliseconds in which a kernel gets as far as to find no root; under KVM it takes a second. */
const PROBE_MS = 15_000;
/** Milliseconds more for what was killed to be gone. */
const DEATH_MS = 5_000;
/** Milliseconds for which it is believed that guests hang. */
const HUNG_MS = 86_400_000;
/** Characters of what QEMU said. */
const MAX_REASON = 500;

/** What a guest is booted with that is to find no root, which ends it: as machines are, without what those need more. */
const ARGUMENTS = [
  ...["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-m", "128M"],
  ...["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"],
  ...["-machine", "microvm,accel=kvm", "-cpu", "host"],
  ...["-kernel", "/proc/self/fd/3", "-append", "panic=-1 reboot=t quiet"],
];
/** The kernel is opened by who may reach it; a QEMU that breaks off is not to leave its memory in a file, nor to know our environment. */
const OPEN = 'ulimit -c 0 && exec 3<"$1" && shift && exec env -i PATH="$PATH" LC_ALL=C "$@"';

/** An answer, and what it holds for. */
const Kept = v.object({
  where: v.string(),
  /** Milliseconds since the epoch. */
  at: v.number(),
  accel: v.picklist(["kvm", "tcg"]),
  reason: v.nullable(v.string()),
});
type Kept = v.InferOutput<typeof Kept>;

export interface AcceleratorOptions {
  /** Whom QEMU runs as; null for this process's own user. */
  owner?: Owner | null;
  /** Milliseconds for the guest, in whole seconds. */
  timeout?: number;
  device?: string;
  /** The program, in PATH or by its own. */
  qemu?: string;
}

/**
 * Which accelerator this machine has. That /dev/kvm opens is no proof: on some machines QEMU breaks off or a guest hangs as
 * soon as it runs. So a guest is booted once, by the user that machines are run by. What took long to find out, and that it
 * works, is remembered for this kernel, QEMU, processor and user; anything else may be mended before the next start.
 */
export class Accelerator {
  readonly #wanted: Accel | "auto";
  readonly #file: string;
  readonly #log: Logger;
  readonly #options: Required<AcceleratorOptions>;
  #found: Promise<Accel> | undefined;

  /** `file` is where the answer is kept. */
  constructor(wanted: Accel | "auto", file: string, log: Logger, options: AcceleratorOptions = {}) {
    this.#wanted = wanted;
    this.#file = file;
    this.#log = log;
    this.#options = { owner: null, timeout: PROBE_MS, device: "/dev/kvm", qemu: "qemu-system-x86_64", ...options };
  }

  /** Where nobody has booted a guest yet, by booting this image's kernel. */
  async of(image: Pick<Image, "kernel">): Promise<Accel> {
    if (this.#wanted !== "auto") return this.#wanted;
    return await (this.#found ??= this.#find(image));
  }

  async #find({ kernel }: Pick<Image, "kernel">): Promise<Accel> {
    const { device, timeout } = this.#options;
    const lacking = lacksKvm(device);
    const where = await describeMachine(this.#options);
    const kept = lacking === null ? this.#kept(where) : undefined;
    const began = performance.now();
    const reason = lacking ?? (kept ? kept.reason : await probe(kernel, this.#options));
    const accel = reason === null ? "kvm" : "tcg";
    const late = performance.now() - began >= timeout;
    if (!kept && (reason === null || late)) this.#keep({ where, at: Date.now(), accel, reason });
    if (reason !== null) {
      const note = kept || late ? `${reason} (remembered in ${this.#file})` : reason;
      this.#log.warn("Machines are emulated, which is slow: {reason}", { reason: note });
    }
    return accel;
  }

  /** What can be read of it; whatever else is there is as good as nothing. */
  #kept(where: string): Kept | undefined {
    if (!existsSync(this.#file)) return undefined;
    try {
      const kept = v.parse(Kept, JSON.parse(readFileSync(this.#file, "utf8")));
      // That a guest hangs may be this image's own doing: it is tried again some day.
      const good = kept.accel === "kvm" || Date.now() - kept.at < HUNG_MS;
      return kept.where === where && good ? kept : undefined;
    } catch (error) {
      this.#log.warn("Cannot use {file}: {reason}", { file: this.#file, reason: messageOf(error) });
      return undefined;
    }
  }

  #keep(found: Kept): void {
    try {
      mkdirSync(dirname(this.#file), { recursive: true });
      writeFileSync(`${this.#file}.tmp`, JSON.stringify(found));
      renameSync(`${this.#file}.tmp`, this.#file);
    } catch (error) {
      // It is found out again by the next host.
      this.#log.warn("Cannot write {file}: {reason}", { file: this.#file, reason: messageOf(error) });
    }
  }
}

function lacksKvm(device: string): string | null {
  try {
    accessSync(device, constants.R_OK | constants.W_OK);
    return null;
  } catch (error) {
    return `no KVM: ${messageOf(error)}`;
  }
}

/** What an answer depends on. */
async function describeMachine({ owner, qemu }: Required<AcceleratorOptions>): Promise<string> {
  const version = await run(qemu, ["--version"]).catch(messageOf);
  const user = owner?.uid ?? process.getuid?.();
  return [release(), version.split("\n")[0], cpus()[0]?.model, `user ${user}`].join("; ");
}

/** Why a kernel does not run under KVM, or null: without a root it panics, which ends QEMU. */
async function probe(
  kernel: string,
  { owner, timeout: ms, qemu }: Required<AcceleratorOptions>,
): Promise<string | null> {
  const began = performance.now();
  // By a program of its own, which ends a guest that hangs also where this host is gone by then.
  const bounded = ["timeout", "-s", "KILL", String(Math.ceil(ms / 1000))];
  const command = [...lowered(owner, { args: ARGUMENTS, device: null }), qemu, ...ARGUMENTS];
  const args = ["-c", OPEN, "dormouse-probe", kernel, ...bounded, ...command];
  try {
    // A process that the kernel itself does not let go of is not waited for.
    await deadline(run("/bin/sh", args, { timeout: ms + DEATH_MS }), ms + 2 * DEATH_MS, "Booting a guest");
    return null;
  } catch (error) {
    if (performance.now() - began >= ms) return `a guest under KVM was still running after ${ms} ms`;
    const said = error instanceof CommandError && error.stderr.trim().replaceAll("\n", "; ").slice(0, MAX_REASON);
    return `a guest does not run under KVM: ${said || messageOf(error)}`;
  }
}
