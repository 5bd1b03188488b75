import type { Logger } from "@logtape/logtape";
import type { Reading } from "../../main.ts";
import { messageOf } from "../shared/errors.ts";
import { isAlive, type ProcessId, signalProcess } from "../shared/proc.ts";
import { Agent } from "./agent.ts";
import type { Image } from "./image.ts";
import { exitOf, keepEnding } from "./endings.ts";
import { type ConnectOptions, connectQmp, holdQemu, lastLine, sizeOf, untilDead } from "./launch.ts";
import type { Qmp, QmpEvent } from "./qmp.ts";
import type { Exit, Launch, Owner, Records, Snapshot } from "./records.ts";
import { settled } from "./settled.ts";
import { cancelSave, loadState, saveState, Unrestorable } from "./snapshot.ts";
import { ConnectionLost, within } from "./socket.ts";

/** Milliseconds for a monitor to answer where nothing keeps it. */
const ANSWER_MS = 5_000;

export interface Link {
  readonly launch: Launch;
  readonly main: ProcessId;
  readonly qmp: Qmp;
  readonly agent: Agent;
}
export interface StartOptions {
  signal: AbortSignal;
  /** Whether it takes over the state of the snapshot in the place of booting. */
  incoming?: boolean;
  /** Called when it has, before it runs. */
  prepare?: (link: Link) => Promise<void>;
}
export interface VmContext {
  readonly records: Records;
  readonly log: Logger;
  /** Whom QEMU runs as; null for this process's own user. */
  readonly owner: Owner | null;
  /** Milliseconds for QEMU to answer after it was started. */
  readonly startTimeout: number;
  /** The machine has ended. */
  ended(): void;
}

/**
 * The machine of one instance. What it is follows from its files, from `/proc` and from QEMU's own answer each time; what
 * is held here is only the connection. Its methods are called one at a time.
 */
export class Vm implements Disposable {
  readonly #context: VmContext;
  #link: Link | undefined;
  /** Whether it was let go of; what runs then is the next host's. */
  disposed = false;

  constructor(context: VmContext) {
    this.#context = context;
  }

  get records(): Records {
    return this.#context.records;
  }

  /** The connection to what runs, if anything does. */
  get link(): Link | undefined {
    return this.#link;
  }

  /**
   * What it is, after what a host left half done was finished or undone: a device state that is whole has QEMU's work done,
   * a machine that stands still without one goes on.
   *
   * @throws where that cannot be told
   */
  async look(): Promise<Exclude<Reading, { state: "Unknown" }>> {
    const { records } = this;
    const launch = records.launch();
    if (!launch) return { state: "Stopped", exit_code: null, exit_message: null };
    if (records.isAnothers()) throw new Error(`"${records.ram}" is that of a machine of another data_dir`);
    let status: string;
    try {
      const link = await this.#connected(launch);
      if (!link) return this.#dead(launch);
      status = (await link.qmp.execute("query-status", {}, { timeout: ANSWER_MS }) as { status: string }).status;
      if (status === "shutdown") await untilDead(link.main);
    } catch (error) {
      // QEMU ends its monitor a moment before itself.
      const ending = error instanceof ConnectionLost && !this.disposed ? this.#process(launch) : undefined;
      if (ending) await untilDead(ending, AbortSignal.timeout(ANSWER_MS)).catch(() => {});
      if (this.#process(launch)) throw new Error(`QEMU does not answer: ${messageOf(error)}`, { cause: error });
      return this.#dead(launch);
    }
    if (status === "shutdown") return this.#dead(launch);
    const state = await settled(this.#link!.qmp, records, status);
    if (state !== "over") return { state };
    await this.end();
    return this.#dead(launch);
  }

  /** Starts QEMU, to boot or to take over the state of the snapshot. @throws what ended the start; then nothing runs */
  async start(
    wanted: Omit<Launch, "generation" | "boot">,
    image: Image,
    { signal, incoming = false, prepare }: StartOptions,
  ): Promise<Link> {
    const { records, owner, startTimeout } = this.#context;
    signal.throwIfAborted();
    await this.end();
    const full = incoming && (records.snapshot()?.full ?? false);
    const logged = sizeOf(records.qemuLog);
    // On its way to the disk while the process is made.
    const begun = records.begin(wanted);
    begun.catch(() => {}); // seen below, unless there is no process
    using held = holdQemu({ records, launch: wanted, image, owner, incoming });
    const launch = await begun;
    try {
      if (!incoming) await held.join();
      const main = held.go(records.pidFile(launch));
      // Its pages it has; what else it needs is the same for all.
      const joined = incoming ? held.join() : undefined;
      joined?.catch(() => {}); // seen below
      const link = await this.#connect(launch, main, { timeout: startTimeout, early: incoming, signal });
      if (!incoming) return link;
      await loadState(link.qmp, { full, signal });
      await prepare?.(link);
      // On its way before the guest goes on: it is found at once, and does not see that nobody was there.
      if (image.agent) link.agent.synchronise({ signal }).catch(() => {}); // seen by who asks it something
      await joined;
      signal.throwIfAborted();
      // From here on it is this machine or none: its memory is about to change.
      await records.spend(() => link.qmp.execute("cont"));
      return link;
    } catch (error) {
      // Of a state that was spent and a machine that stands still, the next look makes one that runs.
      if (!incoming || records.has("state")) await this.end();
      if (this.disposed || !(error instanceof ConnectionLost)) throw error;
      const said = lastLine(records.qemuLog, logged);
      // It says this last, whatever is wrong with a state; of all else that ends it the cause may pass.
      const refused = incoming && said.includes("load of migration failed");
      throw new (refused ? Unrestorable : Error)(`QEMU ended: ${said}`, { cause: error });
    }
  }

  /**
   * Has `ask` ask it to end, and ends it after `grace` milliseconds or once `signal` aborts.
   *
   * @throws where it sleeps, unless it is to be ended `asleep`
   */
  async stop(
    ask: (link: Link, signal: AbortSignal) => Promise<void>,
    { grace, asleep, signal }: { grace: number; asleep: boolean; signal: AbortSignal },
  ): Promise<Exit> {
    const { records, log } = this.#context;
    const reading = await this.look().catch((): Reading => ({ state: "Unknown", error: "" }));
    if (reading.state === "Stopped") return { exit_code: reading.exit_code, exit_message: reading.exit_message };
    if (reading.state === "Standby") {
      if (!asleep) throw new Error("it sleeps");
      records.end({ exit_code: null, exit_message: "it was ended in its sleep" });
      await records.spend();
    }
    const link = this.#link;
    if (link) {
      const late = AbortSignal.any([signal, AbortSignal.timeout(grace)]);
      const over = new AbortController();
      try {
        late.throwIfAborted();
        if (reading.state === "Paused") await link.qmp.execute("cont");
        const dead = untilDead(link.main, late);
        await Promise.race([dead, ask(link, AbortSignal.any([late, over.signal])).then(() => dead)]);
      } catch (error) {
        if (!late.aborted) log.debug("It could not be asked to end: {reason}", { reason: messageOf(error) });
      } finally {
        over.abort();
      }
      await link.qmp.quit({ timeout: 2_000 }).catch(() => {}); // it is ended the hard way, if that did not do it
    }
    await this.end();
    if (link) this.#context.ended();
    const exit = await this.look();
    if (exit.state !== "Stopped") throw new Error(`it is ${exit.state} after it was ended`);
    return { exit_code: exit.exit_code, exit_message: exit.exit_message };
  }

  async pause(): Promise<void> {
    const link = this.#running();
    // Before it happens, to tell every host that looks later what it stands still for.
    this.records.mark("paused");
    await link.qmp.execute("stop");
  }

  async resume(): Promise<void> {
    await this.#running().qmp.execute("cont");
    this.records.unmark("paused");
  }

  /**
   * Writes the snapshot, with `plan` for its memory in it, and ends QEMU.
   *
   * @throws the signal's reason where it aborts before the end of QEMU began; then, as after any error, the machine runs
   */
  async standby(plan: Snapshot["plan"], signal: AbortSignal): Promise<void> {
    const { records, owner } = this.#context;
    const { qmp, main, launch } = this.#running();
    const full = !launch.memory.shared;
    signal.throwIfAborted();
    try {
      await qmp.execute("stop");
      await saveState(qmp, records, owner, { full, signal });
      signal.throwIfAborted();
      await records.complete({ full, plan });
      signal.throwIfAborted();
    } catch (error) {
      await records.spend();
      await cancelSave(qmp);
      throw error;
    }
    await qmp.quit().catch(() => signalProcess(main.pid, "SIGKILL")); // nothing of it is needed any more
    await this.end();
    if (full) records.leaveBase();
  }

  /** Ends QEMU at once, if it runs. */
  async end(): Promise<void> {
    const launch = this.records.readableLaunch();
    if (!launch) return;
    const main = this.#process(launch);
    if (main) {
      signalProcess(main.pid, "SIGKILL");
      await untilDead(main);
    }
    this.#drop(this.#link);
  }

  /** Lets go of it; what runs goes on running. */
  [Symbol.dispose](): void {
    this.disposed = true;
    this.#drop(this.#link);
  }

  #process(launch: Launch): ProcessId | undefined {
    const main = this.records.processOf(launch);
    return main && isAlive(main) ? main : undefined;
  }

  #running(): Link {
    if (this.#link) return this.#link;
    throw new Error("nothing runs");
  }

  async #connected(launch: Launch): Promise<Link | undefined> {
    const [link, main] = [this.#link, this.#process(launch)];
    if (link && link.launch.generation === launch.generation) {
      if (main) return link;
      // What it said last, before it is let go of: why it has ended.
      await within(link.qmp.closed, ANSWER_MS, "The end of the connection").catch(() => {}); // it says no more, then
    }
    this.#drop(this.#link);
    return main && await this.#connect(launch, main, { timeout: ANSWER_MS });
  }

  async #connect(launch: Launch, main: ProcessId, options: Omit<ConnectOptions, "onEvent">): Promise<Link> {
    const qmp = await connectQmp(this.records, main, { ...options, onEvent: (event) => this.#event(event) });
    const link = this.#link = { launch, main, qmp, agent: new Agent(this.records.path("run/agent.sock")) };
    qmp.closed.then(() => this.#lost(link)).catch((error) => this.#context.log.warn("{reason}", { reason: error }));
    return link;
  }

  #event(event: QmpEvent): void {
    try {
      keepEnding(this.records, event);
    } catch (error) {
      this.#context.log.warn("How a machine ended could not be kept: {reason}", { reason: messageOf(error) });
    }
  }

  /** Tells of the end of what was not let go of here. */
  async #lost(link: Link): Promise<void> {
    if (this.#link !== link) return;
    this.#drop(link);
    try {
      await untilDead(link.main);
    } finally {
      this.#context.ended();
    }
  }

  #drop(link: Link | undefined): void {
    if (this.#link === link) this.#link = undefined;
    if (!link) return;
    link.qmp.close();
    void link.agent[Symbol.asyncDispose]();
  }

  #dead(launch: Launch): { state: "Standby" } | ({ state: "Stopped" } & Exit) {
    const { records } = this;
    const snapshot = records.snapshot();
    // A host may have died between the end of a copy's first sleep and this.
    if (snapshot?.full) records.leaveBase();
    if (snapshot) return { state: "Standby" };
    // The disk that its memory took is free again.
    records.free(this.#context.owner);
    return { state: "Stopped", ...exitOf(records, launch) };
  }
}
