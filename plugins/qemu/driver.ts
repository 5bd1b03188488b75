import { type ExecRequest, type ExecResult, type Feature, type Instance, type LogRequest } from "../../main.ts";
import { DormouseError, type Driver, type PathInfo, type Reading, type Size, type Stats } from "../../main.ts";
import { abortable } from "../shared/async.ts";
import { messageOf } from "../shared/errors.ts";
import { formatSize } from "../shared/size.ts";
import { putAway } from "./asleep.ts";
import { checkDisk, makeOverlay } from "./disk.ts";
import { execute, orFailed } from "./exec.ts";
import type { Fleet } from "./fleet.ts";
import { Copier } from "./fork.ts";
import { type DriverName, type GuestNetwork, kernelCommandLine, sizeOf } from "./machine.ts";
import type { Exit } from "./records.ts";
import { planOf } from "./snapshot-policy.ts";
import { statsOf } from "./stats.ts";
import { stat } from "./tasks.ts";
import { Power } from "./power.ts";
import type { Link, Vm } from "./vm.ts";
import { Waking } from "./waking.ts";

/** That images need which ask for their address. */
const DHCP_PROGRAMS = ["dnsmasq", "setpriv"];
/** Bytes without which no kernel gets anywhere, and what a processor of 40 address bits reaches beside its devices. */
const [MIN_MEMORY, MAX_MEMORY] = [32 * 1024 * 1024, 512 * 1024 * 1024 * 1024];
/** What QEMU gives a machine without an interrupt controller of the host's kernel. */
const MAX_VCPUS = 255;

/** Of the longest words that a command line can hold of it, to check that it fits before there are any. */
const LONGEST: GuestNetwork = {
  device: "",
  mac: "",
  address: "255.255.255.255/32",
  gateway: "255.255.255.255",
  address6: "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/128",
  gateway6: "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
};

/** Runs instances as machines of one kind, each in a QEMU of its own. */
export class QemuDriver implements Driver {
  readonly name: DriverName;
  readonly features = new Set<Feature>(["pause", "standby", "fork", "exec", "stats", "stat", "logs"]);
  readonly #fleet: Fleet;
  readonly #power: Power;
  readonly #waking: Waking;
  readonly #copier: Copier;

  constructor(name: DriverName, fleet: Fleet) {
    this.name = name;
    this.#fleet = fleet;
    this.#power = new Power(name, fleet);
    this.#waking = new Waking(fleet, this.#power);
    this.#copier = new Copier(fleet, this.#power);
  }

  unavailable(): string | null {
    return this.#fleet.context.lacking;
  }

  async validate(instance: Instance): Promise<Size> {
    const image = this.#power.image(instance);
    if (instance.run_as !== null) {
      throw new DormouseError("invalid_request", `Wrong value of "run_as": a machine has users of its own`);
    }
    const { vcpus, bytes } = sizeOf(instance, image);
    if (vcpus > MAX_VCPUS) {
      throw new DormouseError("invalid_request", `Wrong value of "vcpus": a machine has at most ${MAX_VCPUS}`);
    }
    if (bytes < MIN_MEMORY || bytes > MAX_MEMORY) {
      const [least, most] = [MIN_MEMORY, MAX_MEMORY].map(formatSize);
      throw new DormouseError("invalid_size", `Wrong value of "size": a machine has from ${least} to ${most}`);
    }
    if (image.disk) await checkDisk(image.disk, instance.hints.overlay_size);
    const missing = image.dhcp && instance.network.enabled ? this.#fleet.context.missing(DHCP_PROGRAMS) : undefined;
    if (missing !== undefined) {
      const reason = `it asks for its address by DHCP, and program "${missing}" is not in PATH`;
      throw new DormouseError("invalid_request", `Wrong value of "image": ${reason}`);
    }
    kernelCommandLine(instance, { image, network: LONGEST, driver: this.name, accel: "tcg" });
    return { vcpus, memory_bytes: instance.memory_bytes ?? image.size };
  }

  async create(instance: Instance): Promise<void> {
    const image = this.#power.image(instance);
    await this.#fleet.turn(instance.id, async ({ records }) => {
      const { owner } = this.#fleet.context;
      records.make(owner);
      if (image.disk) await makeOverlay(records.path("overlay.qcow2"), image.disk, instance.hints.overlay_size);
      records.make(owner);
    });
  }

  async start(instance: Instance, signal: AbortSignal): Promise<"Initializing" | "Running"> {
    return await this.#fleet.turn(instance.id, async (vm) => {
      signal.throwIfAborted();
      const { state } = await vm.look();
      if (state === "Paused") return await this.#resume(vm, instance);
      if (state === "Standby") return await this.#waking.wake(vm, instance, signal);
      if (state === "Stopped") await this.#power.boot(vm, instance, signal);
      return this.#power.watch(vm, instance);
    });
  }

  async stop(instance: Instance, signal: AbortSignal): Promise<Exit> {
    const { id } = instance;
    return await this.#fleet.turn(id, async (vm) => {
      const asleep = !await this.#waking.rouse(vm, instance, signal);
      await this.#fleet.quiet(id);
      const ask = (link: Link, signal: AbortSignal) => this.#power.ask(link, instance, signal);
      const exit = await vm.stop(ask, { grace: this.#fleet.context.options.grace, asleep, signal });
      return await this.#fleet.leave(vm, id, exit);
    });
  }

  async delete(instance: Instance): Promise<void> {
    this.#fleet.unwatch(instance.id);
    await this.#fleet.turn(instance.id, (vm) => vm.end());
    // The cable last: QEMU has it open.
    if (instance.network.enabled) await this.#fleet.context.network?.detach(instance);
    await this.#fleet.erase(instance.id);
  }

  async inspect(instance: Instance): Promise<Reading> {
    return await this.#fleet.turn(instance.id, async (vm): Promise<Reading> => {
      try {
        const reading = await vm.look();
        if (reading.state === "Stopped") {
          return { state: "Stopped", ...await this.#fleet.leave(vm, instance.id, reading) };
        }
        if (reading.state === "Initializing" || reading.state === "Running") this.#power.watch(vm, instance);
        return reading;
      } catch (error) {
        return { state: "Unknown", error: messageOf(error) };
      }
    });
  }

  async adopt(instance: Instance): Promise<Reading> {
    const { records } = this.#fleet.vm(instance.id);
    await this.#fleet.recoverLogs(instance.id);
    const reading = await this.inspect(instance);
    if (reading.state === "Standby") {
      putAway(this.#fleet, instance);
      return reading;
    }
    // One that sleeps is answered as it wakes.
    if (reading.state !== "Stopped" && reading.state !== "Unknown") await this.#power.serveAgain(instance);
    records.tidy();
    return reading;
  }

  async pause({ id }: Instance): Promise<void> {
    await this.#fleet.turn(id, async (vm) => {
      if ((await vm.look()).state !== "Paused") await vm.pause();
    });
  }

  async resume(instance: Instance): Promise<void> {
    await this.#fleet.turn(instance.id, async (vm) => {
      if ((await vm.look()).state === "Paused") await this.#resume(vm, instance);
    });
  }

  async standby(instance: Instance, signal: AbortSignal): Promise<void> {
    const { id } = instance;
    await this.#fleet.turn(id, async (vm) => {
      const { state } = await vm.look();
      if (state === "Standby") return;
      if (state !== "Running") throw new Error(`it is ${state}`);
      this.#fleet.unwatch(id);
      // Its clock stands still from here on, also where it is called back, or this host dies.
      vm.records.mark("stale");
      // The first sleep of a copy takes its memory along, for which a host that closes does not wait.
      const quick = vm.link?.launch.memory.shared;
      const given = quick ? signal : AbortSignal.any([signal, this.#fleet.context.closing]);
      await vm.standby(planOf(instance), given);
      this.#fleet.unwatchLogs(id);
      putAway(this.#fleet, instance);
    });
  }

  async restore(instance: Instance, signal: AbortSignal): Promise<"Initializing" | "Running"> {
    return await this.#fleet.turn(instance.id, (vm) => this.#waking.wake(vm, instance, signal));
  }

  async fork(source: Instance, target: Instance): Promise<void> {
    await this.#copier.copy(source, target);
  }

  async exec(instance: Instance, request: ExecRequest): Promise<ExecResult> {
    const { agent } = await this.#guest(instance, "exec in");
    const env = { ...instance.env, ...request.env };
    const working_dir = request.working_dir ?? instance.working_dir;
    const work = execute(agent, {
      ...request,
      ...(Object.keys(env).length > 0 && { env }),
      ...(working_dir !== null && { working_dir }),
    });
    try {
      return await orFailed(work, `exec in instance "${instance.name}"`, request.signal);
    } catch (error) {
      if (request.signal?.aborted) throw error;
      const looked = this.inspect(instance);
      const { state } = await (request.signal ? abortable(looked, request.signal) : looked);
      if (state === "Running" || state === "Unknown") throw error;
      const message = `Cannot exec in instance "${instance.name}": it is ${state} by now`;
      throw new DormouseError("invalid_state", message, { cause: error, details: { state } });
    }
  }

  async stats({ id, name }: Instance): Promise<Stats> {
    const link = this.#fleet.vm(id).link;
    if (link) return statsOf(link.main, link.launch.device);
    throw new DormouseError("invalid_state", `Cannot read stats of instance "${name}": nothing of it runs`);
  }

  async stat(instance: Instance, path: string, follow: boolean): Promise<PathInfo> {
    const { agent } = await this.#guest(instance, "look into");
    return await orFailed(stat(agent, path, follow), `look into instance "${instance.name}"`);
  }

  /** @throws {DormouseError} `log_not_found`, at once and not with the first line */
  logs({ id, name }: Instance, { source, tail, follow, signal }: LogRequest): AsyncIterable<string> {
    const log = this.#fleet.log(id, source);
    if (log) return withoutReturns(log.lines({ tail, follow, signal }));
    throw new DormouseError("log_not_found", `No log of source "${source}" for instance "${name}"`);
  }

  /** Its clock has stood still with it. */
  async #resume(vm: Vm, instance: Instance): Promise<"Initializing" | "Running"> {
    // What was told it before the pause is begun anew.
    this.#fleet.unwatch(instance.id);
    vm.records.mark("stale");
    await vm.resume();
    return this.#power.watch(vm, instance);
  }

  async #guest(instance: Instance, what: string): Promise<Link> {
    const { id, name } = instance;
    const reading = await this.inspect(instance);
    const link = this.#fleet.vm(id).link;
    if (reading.state !== "Running" || !link) {
      throw new DormouseError("invalid_state", `Cannot ${what} instance "${name}": state is ${reading.state}`);
    }
    if (this.#power.image(instance).agent) return link;
    throw new DormouseError("not_supported", `Cannot ${what} instance "${name}": its image has no guest agent`);
  }
}

/** A console ends its lines as terminals do. */
async function* withoutReturns(lines: AsyncIterable<string>): AsyncGenerator<string> {
  for await (const line of lines) yield line.replace(/\r$/, "");
}
