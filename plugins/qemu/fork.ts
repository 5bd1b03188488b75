import { existsSync } from "node:fs";
import { DormouseError, type Instance } from "../../main.ts";
import { putAway } from "./asleep.ts";
import { keepExpanded } from "./compress.ts";
import { copyOverlay } from "./disk.ts";
import type { Fleet } from "./fleet.ts";
import { copiedArguments, type GuestNetwork } from "./machine.ts";
import type { Power } from "./power.ts";
import type { Records } from "./records.ts";
import type { Vm } from "./vm.ts";

/** Milliseconds in which a compressed memory is written out for a copy. */
const EXPAND_MS = 600_000;

/** Makes copies of machines that do not run. */
export class Copier {
  readonly #fleet: Fleet;
  readonly #power: Power;

  constructor(fleet: Fleet, power: Power) {
    this.#fleet = fleet;
    this.#power = power;
  }

  /**
   * A stopped machine's disk is copied. Of one that sleeps, the copy gets a view of the memory, which is its own from the
   * first change on; it is told who it is when it wakes.
   *
   * @throws {DormouseError} `invalid_state`; `not_supported` where nobody could tell it
   */
  async copy(source: Instance, target: Instance): Promise<void> {
    const image = this.#power.image(source);
    const { owner } = this.#fleet.context;
    await this.#fleet.turn(source.id, async (vm) => {
      const [from, { state }] = [vm.records, await vm.look()];
      if (state !== "Stopped" && state !== "Standby") {
        throw new DormouseError("invalid_state", `Cannot fork instance "${source.name}": state is ${state}`);
      }
      if (state === "Standby" && !image.agent) {
        const message = `Cannot fork instance "${source.name}" in its sleep: its image has no guest agent`;
        throw new DormouseError("not_supported", `${message}, which would tell the copy that it is another one`);
      }
      if (state === "Standby") await this.#expanded(vm, source);
      await this.#fleet.turn(target.id, async ({ records }) => {
        const network = state === "Standby" ? await this.#networkOf(target, from, source) : null;
        records.make(owner);
        const [disk, copy] = [from, records].map((each) => each.path("overlay.qcow2"));
        if (existsSync(disk)) await copyOverlay(disk, copy);
        records.make(owner);
        if (state === "Standby") await this.#inherit(records, target, { from, network });
      });
    }).finally(() => putAway(this.#fleet, source));
    putAway(this.#fleet, target);
  }

  /** The cable of a copy of what sleeps. @throws {DormouseError} `invalid_state` where only one of both has one */
  async #networkOf(target: Instance, from: Records, { name }: Instance): Promise<GuestNetwork | null> {
    const network = await this.#power.wire(target);
    const [had, has] = [from.launch()!.device !== null, network !== null];
    if (had === has) return network;
    const words = (network: boolean) => network ? "with a network" : "without one";
    const message = `Cannot fork instance "${name}" in its sleep: it fell asleep ${words(had)}`;
    throw new DormouseError("invalid_state", `${message}, and its copy would wake ${words(has)}`);
  }

  /** It wakes as the very machine that fell asleep, whatever its image says by now. */
  async #inherit(
    records: Records,
    target: Instance,
    { from, network }: { from: Records; network: GuestNetwork | null },
  ): Promise<void> {
    const { args, accel, image, memory: { bytes } } = from.launch()!;
    await records.inherit(from, {
      args: copiedArguments(args, target, network),
      accel,
      memory: { bytes, shared: from.snapshot()!.full },
      image,
      device: network?.device ?? null,
    });
  }

  /** Has the memory of a machine that sleeps in its own file, and nobody compress it. */
  async #expanded({ records }: Vm, { id }: Instance): Promise<void> {
    await this.#fleet.quiet(id);
    if (!records.snapshot()?.compressed) return;
    const { owner } = this.#fleet.context;
    const { bytes } = records.launch()!.memory;
    await keepExpanded(records, { bytes, owner, signal: AbortSignal.timeout(EXPAND_MS) });
  }
}
