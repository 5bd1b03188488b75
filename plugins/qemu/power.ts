import { dirname } from "node:path";
import type { Instance } from "../../main.ts";
import { abortable, delay } from "../shared/async.ts";
import { formatDuration } from "../shared/duration.ts";
import { messageOf } from "../shared/errors.ts";
import { bootId } from "../shared/proc.ts";
import { AgentError } from "./agent.ts";
import { expand } from "./compress.ts";
import type { Fleet } from "./fleet.ts";
import type { Image } from "./image.ts";
import { argumentsOf, type DriverName, type GuestNetwork, sizeOf } from "./machine.ts";
import { bootDeadline, isAtOnce, type Readiness, readinessOf, refresh, rewind, settleIn, untilReady } from "./ready.ts";
import type { Snapshot } from "./records.ts";
import { Unrestorable } from "./snapshot.ts";
import { shutdown, TaskError } from "./tasks.ts";
import type { Link, Vm } from "./vm.ts";
import { wire as attach } from "./wire.ts";

/** Milliseconds for the guest agent to take up the request to shut down, before the power button is pressed. */
const ASK_MS = 3_000;
/** Milliseconds for a copy to take its own place before its restore is answered; it goes on after that. */
const SETTLE_MS = 60_000;
/** Milliseconds until a guest that could not be spoken with is spoken to again: the first time, and at most. */
const [RETRY_MS, LONGEST_RETRY_MS] = [1_000, 30_000];

/** Brings the machines of one kind up: boots them, wakes them, and notices when their guests are ready. */
export class Power {
  readonly #name: DriverName;
  readonly #fleet: Fleet;

  constructor(name: DriverName, fleet: Fleet) {
    this.#name = name;
    this.#fleet = fleet;
  }

  image({ image }: Pick<Instance, "image">): Image {
    return this.#fleet.context.images.read(image);
  }

  async boot(vm: Vm, instance: Instance, signal: AbortSignal): Promise<void> {
    const { accelerator, owner } = this.#fleet.context;
    const image = this.image(instance);
    const accel = await accelerator.of(image);
    await vm.end();
    vm.records.make(owner);
    const network = await this.wire(instance);
    if (image.dhcp && network) await this.#fleet.dhcp.serve(instance);
    const joins = this.#fleet.limits.prepare(instance.id, { ...sizeOf(instance, image), accel });
    const { bytes } = sizeOf(instance, image);
    const args = argumentsOf(instance, { driver: this.#name, accel, image, network });
    const memory = { bytes, shared: true };
    const wanted = { args, accel, memory, image: image.folder, device: network?.device ?? null };
    signal.throwIfAborted();
    // Nothing but QEMU itself can fail from here on, so what slept is lost for nothing less.
    if (vm.records.has("state")) await vm.records.spend();
    vm.records.clear();
    vm.records.blank(bytes, owner);
    await vm.start({ ...wanted, joins }, image, { signal });
  }

  async restore(vm: Vm, instance: Instance, signal: AbortSignal): Promise<"Initializing" | "Running"> {
    const { owner, images } = this.#fleet.context;
    const { records } = vm;
    const { state } = await vm.look();
    if (state === "Running" || state === "Initializing") return this.watch(vm, instance);
    if (state !== "Standby") throw new Error(`it is ${state}`);
    const snapshot = records.snapshot()!;
    if (!isRestorable(snapshot)) {
      throw new Unrestorable("this machine was restarted before the guest's memory was on disk");
    }
    using _slot = await this.#fleet.restores.take(signal);
    await this.#fleet.quiet(instance.id);
    records.make(owner);
    await this.wire(instance);
    const before = records.launch()!;
    if (!snapshot.full && !snapshot.compressed && !records.isWhole(before.memory.bytes)) {
      throw new Unrestorable(`its memory is not there any more, in "${dirname(records.ram)}"`);
    }
    const image = images.read(before.image);
    await this.serve(instance, image);
    if (snapshot.compressed) await expand(records, { bytes: before.memory.bytes, owner, signal });
    else if (snapshot.full) records.blank(before.memory.bytes, owner);
    else if (before.memory.shared) await records.separate(owner, { durable: snapshot.durable, signal });
    const memory = { ...before.memory, shared: snapshot.full || before.memory.shared };
    const { args, accel, device } = before;
    const foreign = records.isMarked("foreign");
    // A copy is not let onto the network before it knows who it is.
    const prepare = foreign && device !== null
      ? async ({ qmp }: Link) => void await qmp.execute("set_link", { name: "net", up: false })
      : undefined;
    if (image.agent) records.mark("stale");
    const { vcpus } = sizeOf(instance, image);
    const joins = this.#fleet.limits.prepare(instance.id, { vcpus, bytes: memory.bytes, accel });
    const wanted = { args, accel, device, memory, image: before.image, joins };
    await vm.start(wanted, image, { signal, incoming: true, ...(prepare && { prepare }) });
    if (foreign) {
      await this.#settle(vm, instance, AbortSignal.any([signal, AbortSignal.timeout(SETTLE_MS)])).catch((error) =>
        this.#warn(instance, error) // which is tried again until it works
      );
    } else if (image.agent) {
      await abortable(this.#freshen(instance), signal).catch(() => {}); // it runs, whoever waits for it
    }
    return this.watch(vm, instance);
  }

  /**
   * Tells a guest what it could not notice in its sleep, until it has taken it up. Resolves when its clock is right, or
   * when that takes longer; its random numbers are in no hurry, as nobody else was made of this memory.
   */
  #freshen(instance: Instance): Promise<void> {
    const { promise, resolve } = Promise.withResolvers<void>();
    const vm = this.#fleet.vm(instance.id);
    this.#fleet.watch(instance.id, async (gone) => {
      try {
        let [clock, fresh]: ["right" | "unsure" | "unheard", boolean] = ["unheard", false];
        for (let pause = RETRY_MS;; pause = Math.min(pause * 2, LONGEST_RETRY_MS)) {
          if (clock !== "right") clock = await this.#rewound(vm, instance, { gone, told: resolve, pause });
          resolve();
          if (!fresh && clock !== "unheard") fresh = await this.#refreshed(vm, instance, gone);
          if ((clock === "right" && fresh) || !vm.link) return;
          await delay(pause, { signal: gone });
        }
      } catch (error) {
        if (!gone.aborted) this.#warn(instance, error);
      } finally {
        resolve();
      }
    });
    return promise;
  }

  /** Tells it what time it is. `unsure`: it hears, and its clock is not right, or so slowly that nobody knows. */
  async #rewound(
    { records, link }: Vm,
    instance: Instance,
    { gone, told, pause }: { gone: AbortSignal; told: () => void; pause: number },
  ): Promise<"right" | "unsure" | "unheard"> {
    try {
      if (!link) return "unheard";
      if (!await rewind(link.agent, gone, told)) {
        if (pause === RETRY_MS) this.#warn(instance, new Error("it answers too slowly to be sure of its clock"));
        return "unsure";
      }
      records.unmark("stale");
      return "right";
    } catch (error) {
      gone.throwIfAborted();
      if (pause === RETRY_MS) this.#warn(instance, error);
      return error instanceof AgentError ? "unsure" : "unheard";
    }
  }

  /** Whether it has new random numbers, or has said that it cannot. */
  async #refreshed({ link }: Vm, instance: Instance, gone: AbortSignal): Promise<boolean> {
    try {
      if (link) await refresh(link.agent, gone);
      return true;
    } catch (error) {
      gone.throwIfAborted();
      this.#warn(instance, error);
      return error instanceof AgentError || error instanceof TaskError;
    }
  }

  /** Notices when it is ready, where it is not; the state that it has now. */
  watch(vm: Vm, instance: Instance): "Initializing" | "Running" {
    const { records } = vm;
    const { id } = instance;
    this.#fleet.watchLogs(id);
    if (records.isMarked("ready")) {
      // A host that died on the way, a pause, or a sleep that was given up has left it with the time of before.
      if (records.isMarked("stale") && !this.#fleet.isWatched(id)) {
        if (this.#hasAgent(instance)) void this.#freshen(instance);
        else records.unmark("stale"); // nobody could tell it
      }
      return "Running";
    }
    const readiness = readinessOf(instance, this.image(instance));
    if (isAtOnce(readiness)) {
      records.mark("ready");
      return "Running";
    }
    if (!this.#fleet.isWatched(id)) {
      const late = bootDeadline(vm.link!.main, this.#fleet.context.options.boot_timeout);
      this.#fleet.watch(id, async (gone) => {
        const signal = AbortSignal.any([gone, late]);
        const ready = await this.#waited(vm, instance, readiness, signal).catch(() => false);
        if (gone.aborted) return;
        if (!ready) return await this.#giveUp(instance, gone);
        records.mark("ready");
        this.#fleet.context.changed(id, "ready");
      });
    }
    return "Initializing";
  }

  /** Resolves once it is ready. @throws the signal's reason */
  async #waited(vm: Vm, instance: Instance, readiness: Readiness, signal: AbortSignal): Promise<true> {
    for (;;) {
      try {
        // It is on no network before.
        if (vm.records.isMarked("foreign")) await this.#settle(vm, instance, signal);
        await untilReady(readiness, vm.link!.agent, signal);
        signal.throwIfAborted();
        return true;
      } catch (error) {
        signal.throwIfAborted();
        const [{ name }, reason] = [instance, messageOf(error)];
        this.#fleet.context.log.warn("{name} is not ready yet: {reason}", { name, reason });
        await delay(RETRY_MS, { signal });
      }
    }
  }

  /** Ends a machine that did not become ready in time: who restarts it finds out, and nobody waits for ever. */
  async #giveUp({ id, name }: Instance, gone: AbortSignal): Promise<void> {
    const { log, changed, options } = this.#fleet.context;
    await this.#fleet.turn(id, async (vm) => {
      if (gone.aborted || vm.records.isMarked("ready")) return;
      const exit_message = `it was not ready within ${formatDuration(options.boot_timeout)}`;
      log.warn("Ending {name}: {reason}", { name, reason: exit_message });
      vm.records.end({ exit_code: null, exit_message });
      await vm.end();
      changed(id, "exit");
    });
  }

  /**
   * Asks a guest to end until the signal aborts or QEMU is gone: by its agent, else by the power button, for not every
   * guest has both, and one that boots has neither yet.
   *
   * @throws where it could not be asked at all; the signal's reason
   */
  async ask({ agent, qmp }: Link, instance: Instance, signal: AbortSignal): Promise<void> {
    let [listens, asked] = [this.#fleet.vm(instance.id).records.isMarked("ready"), false];
    try {
      for (;; listens = true) {
        if (listens && this.#hasAgent(instance)) {
          if (await shutdown(agent, { timeout: ASK_MS, signal }).then(() => true, () => false)) return;
          signal.throwIfAborted();
        }
        await qmp.execute("system_powerdown");
        asked = true;
        await delay(RETRY_MS, { signal });
      }
    } catch (error) {
      // A monitor that is lost is no reason to cut the guest off that has been asked.
      if (!asked || signal.aborted) throw error;
    }
  }

  /** Whose image cannot be read may have one, and its button is pressed as well. */
  #hasAgent(instance: Instance): boolean {
    try {
      return this.image(instance).agent;
    } catch {
      return true;
    }
  }

  /** Gives a copy a name, a place and random numbers of its own. */
  async #settle({ records, link }: Vm, instance: Instance, signal: AbortSignal): Promise<void> {
    await settleIn(link!.agent, instance, await this.wire(instance), signal);
    if (link!.launch.device !== null) await link!.qmp.execute("set_link", { name: "net", up: true });
    records.unmark("foreign");
    records.mark("ready");
  }

  #warn({ name }: Instance, error: unknown): void {
    const reason = messageOf(error);
    this.#fleet.context.log.warn("{name} may have an old clock or old random numbers: {reason}", { name, reason });
  }

  /** Has it answered when it asks for its address, where it does that; it may run meanwhile. */
  async serve(instance: Instance, { dhcp }: Image): Promise<void> {
    const { network } = this.#fleet.context;
    if (!dhcp || !instance.network.enabled || !network?.enabled) return;
    await this.#fleet.dhcp.serve(instance, { patient: true });
  }

  /** {@linkcode Power.serve} for a machine that was there before this host; that its image is gone is its own trouble. */
  async serveAgain(instance: Instance): Promise<void> {
    try {
      await this.serve(instance, this.image(instance));
    } catch (error) {
      const [{ name }, reason] = [instance, messageOf(error)];
      this.#fleet.context.log.warn("{name} may be left without an address: {reason}", { name, reason });
    }
  }

  /** Its cable; the same again where it has one. */
  wire(instance: Instance): Promise<GuestNetwork | null> {
    const { network, owner } = this.#fleet.context;
    return attach(instance, network, owner);
  }
}

function isRestorable({ durable, boot }: Snapshot): boolean {
  return durable || boot === bootId();
}
