import { randomBytes } from "node:crypto";
import { existsSync } from "node:fs";
import { join } from "node:path";
import type { Instance, Reading } from "../../main.ts";
import { Cgroup } from "../shared/cgroup.ts";
import { removeFolder } from "../shared/files.ts";
import type { Hierarchy } from "../shared/hierarchy.ts";
import { bootId, isAlive, type ProcessId, signalProcess } from "../shared/proc.ts";
import type { Command } from "./command.ts";
import { type Enclosure, Session } from "./enclosure.ts";
import type { Exits } from "./exits.ts";
import { type Claim, type Exit, type Launch, Records } from "./launch.ts";
import { startShim } from "./shim.ts";

/** How long a shim may take to write the exit of a program that has ended. */
const SHIM_MS = 10_000;

/** What all workloads of one data_dir share. */
export interface Place {
  /** A folder for each instance. */
  readonly folder: string;
  readonly owner: string;
  /** Undefined where there are no cgroups to be had. */
  readonly hierarchy: Hierarchy | undefined;
  readonly exits: Exits;
  readonly setsid: string;
}

/** A launch that somebody took up. */
interface Run {
  readonly launch: Launch;
  readonly claim: Claim;
}

/**
 * What runs, or ran, for one instance. It holds nothing in memory: all is read from the instance's files, from `/proc`
 * and from the cgroup each time, so that it makes no difference which host started it.
 */
export class Workload {
  readonly records: Records;
  readonly #place: Place;
  readonly #id: string;

  constructor(place: Place, id: string) {
    // Ids become names of files and cgroups.
    if (!/^[\w-]+$/.test(id)) throw new TypeError(`Cannot use "${id}" as the id of an instance`);
    this.#place = place;
    this.#id = id;
    this.records = new Records(join(place.folder, id), place.exits.folder, id);
  }

  /** @throws where its files or its process cannot be read */
  async look(): Promise<Reading> {
    const launch = this.#launch();
    if (!launch) return { state: "Stopped", exit_code: null, exit_message: null };
    const claim = this.records.claim(launch);
    if (!claim) return { state: "Stopped", ...INTERRUPTED };
    if (!runs(claim)) return { state: "Stopped", ...await this.#exit({ launch, claim }) };
    return { state: this.#frozen({ launch, claim }) ?? "Running" };
  }

  /** The processes of what runs, their launch and the first of them; undefined where nothing runs. */
  running(): { enclosure: Enclosure; main: ProcessId; launch: Launch } | undefined {
    const run = this.#run();
    if (!run || !runs(run.claim)) return undefined;
    return { enclosure: enclosureOf(run), main: run.claim.main, launch: run.launch };
  }

  /**
   * Starts a program, after ending what is left of the one before. Returns the limits that this machine cannot set.
   *
   * @throws what ended the start; then nothing of it runs
   */
  async start(
    command: Command,
    options: Pick<Instance, "memory_bytes" | "vcpus"> & Pick<Launch, "isolated" | "device"> & { signal: AbortSignal },
  ): Promise<string[]> {
    const { isolated, device, signal } = options;
    const { hierarchy, owner, setsid } = this.#place;
    await this.end();
    // A new one, which has counted nothing yet.
    await hierarchy?.group(this.#id).remove();
    const cgroup = hierarchy?.group(this.#id, options);
    const lacking = cgroup?.make({ memory_bytes: options.memory_bytes, cpus: options.vcpus }) ?? [];
    const generation = randomBytes(8).toString("hex");
    const launch: Launch = { generation, owner, cgroups: cgroup?.folders ?? [], isolated, device };
    this.records.mark = undefined;
    this.records.begin(launch);
    try {
      const shims = hierarchy?.shims() ?? null;
      const joins = cgroup?.joins ?? [];
      await startShim({ records: this.records, launch, shims, joins, command, setsid, signal });
    } catch (error) {
      await this.end();
      throw error;
    }
    return lacking;
  }

  /** Freezes it; the mark says what for, before it happens, to every host that looks later. */
  async freeze(mark: "Paused" | "Standby", signal?: AbortSignal): Promise<Enclosure> {
    const run = await this.#alive();
    const enclosure = enclosureOf(run);
    this.records.mark = mark;
    try {
      await enclosure.freeze(signal);
    } catch (error) {
      this.records.mark = undefined;
      throw error;
    }
    return enclosure;
  }

  async thaw(): Promise<void> {
    const run = await this.#alive();
    await enclosureOf(run).thaw();
    this.records.mark = undefined;
  }

  /** Asks it to end, and ends it after `grace` milliseconds or once `signal` aborts. Nothing of it is left. */
  async stop(grace: number, signal: AbortSignal): Promise<Exit> {
    const run = this.#run();
    if (run && runs(run.claim)) {
      await enclosureOf(run).terminate();
      const end = Date.now() + grace;
      while (runs(run.claim) && Date.now() < end && !signal.aborted) {
        await this.#place.exits.next(this.#id, Math.min(end - Date.now(), 100), signal);
      }
    }
    await this.end();
    if (run) return await this.#exit(run);
    return this.#launch() ? INTERRUPTED : { exit_code: null, exit_message: null };
  }

  /** Ends whatever is left of it, at once. A launch that nobody took up can not be taken up any more. */
  async end(): Promise<void> {
    const launch = this.#launchIfReadable();
    if (launch) this.records.supersede(launch);
    // Of a data_dir that this one is a copy of, what runs is that one's.
    for (const claim of this.#isForeign() ? [] : this.records.claims()) {
      await enclosureOf({ launch, claim }).kill();
      if (isCurrent(claim)) await this.#awaitShim(claim.shim);
    }
    await this.#place.hierarchy?.group(this.#id).kill();
    this.records.mark = undefined;
  }

  /**
   * Brings what a host left half done to an end that can be told: a launch that nobody took up is withdrawn, a freeze and
   * a thaw that reached some of the processes reach all of them, and what a dead program left behind is ended.
   */
  async settle(): Promise<void> {
    const launch = this.#launch();
    const claim = launch && (this.records.claim(launch) ?? this.records.supersede(launch));
    if (!launch || !claim) return;
    const enclosure = enclosureOf({ launch, claim });
    if (!runs(claim)) return await enclosure.kill();
    if (!this.records.mark) return;
    if (!this.#frozen({ launch, claim })) return await this.thaw();
    // Of a cgroup, the kernel freezes the rest by itself.
    if (enclosure instanceof Session) await enclosure.freeze();
  }

  /** Ends what a program that is dead itself has left behind. */
  async endRest(): Promise<void> {
    const run = this.#run();
    if (run && !runs(run.claim)) await enclosureOf(run).kill();
  }

  /** Ends it and removes all that there is of it. */
  async erase(): Promise<void> {
    await this.end();
    const launch = this.#launchIfReadable();
    if (launch && launch.cgroups.length > 0) await new Cgroup(launch.cgroups).remove();
    await this.#place.hierarchy?.group(this.#id).remove();
    this.records.forgetExits();
    await removeFolder(this.records.folder);
  }

  #run(): Run | undefined {
    const launch = this.#launch();
    const claim = launch && this.records.claim(launch);
    return launch && claim && { launch, claim };
  }

  async #alive(): Promise<Run> {
    const run = this.#run();
    if (run && runs(run.claim)) return run;
    const reading = await this.look();
    throw new Error(`nothing runs: ${reading.state === "Stopped" && reading.exit_message || "it was never started"}`);
  }

  #frozen(run: Run): "Paused" | "Standby" | undefined {
    const enclosure = enclosureOf(run);
    if (!enclosure.isFrozen()) return undefined;
    const { mark } = this.records;
    // A program may stop itself, as shells do with their jobs; nobody freezes a cgroup of ours by accident.
    return mark ?? (enclosure instanceof Cgroup ? "Paused" : undefined);
  }

  async #exit(run: Run): Promise<Exit> {
    const { launch, claim } = run;
    const end = Date.now() + SHIM_MS;
    for (;;) {
      // In this order: a shim that is gone has written before it went.
      const supervised = isCurrent(claim) && isAlive(claim.shim);
      const exit = this.records.exit(launch);
      if (exit) return explained(exit, launch);
      if (!isCurrent(claim)) return lost("the machine was restarted");
      if (!supervised) return lost("what waited for it was killed");
      if (Date.now() > end) return lost("what waited for it does not answer");
      await this.#place.exits.next(this.#id, 20);
    }
  }

  async #awaitShim(shim: ProcessId): Promise<void> {
    const end = Date.now() + SHIM_MS;
    while (isAlive(shim)) {
      if (Date.now() > end) signalProcess(shim.pid, "SIGKILL");
      await this.#place.exits.next(this.#id, 10);
    }
  }

  /** @throws where the file is there and cannot be understood */
  #launch(): Launch | undefined {
    const launch = this.records.launch();
    return launch?.owner === this.#place.owner ? launch : undefined;
  }

  #launchIfReadable(): Launch | undefined {
    try {
      return this.#launch();
    } catch {
      // Its cgroup has a name that is known without.
      return undefined;
    }
  }

  #isForeign(): boolean {
    try {
      return this.records.launch() !== undefined && this.#launch() === undefined;
    } catch {
      return false; // nobody knows whose it is
    }
  }
}

const INTERRUPTED: Exit = { exit_code: null, exit_message: "the start was interrupted before the program began" };

function isCurrent({ boot }: Claim): boolean {
  return boot === bootId();
}

function runs(claim: Claim): boolean {
  return isCurrent(claim) && isAlive(claim.main);
}

function enclosureOf({ launch, claim }: { launch: Launch | undefined; claim: Claim }): Enclosure {
  if (launch?.cgroups[0] && existsSync(launch.cgroups[0])) return new Cgroup(launch.cgroups);
  return isCurrent(claim) ? new Session(claim.main) : NOBODY;
}

/** Of a launch before the machine was started again. */
const NOBODY: Enclosure = {
  joins: [],
  members: () => [],
  isFrozen: () => false,
  freeze: () => Promise.resolve(),
  thaw: () => Promise.resolve(),
  terminate: () => Promise.resolve(),
  kill: () => Promise.resolve(),
  remove: () => Promise.resolve(),
};

function explained(exit: Exit, { cgroups }: Launch): Exit {
  const killed = exit.exit_message === "killed by SIGKILL" && cgroups.length > 0;
  if (!killed || !new Cgroup(cgroups).ranOutOfMemory()) return exit;
  return { ...exit, exit_message: `${exit.exit_message}: out of memory` };
}

function lost(why: string): Exit {
  return { exit_code: null, exit_message: `its exit status is not known: ${why}` };
}
