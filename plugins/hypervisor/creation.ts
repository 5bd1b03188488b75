import type { Driver, Instance, Origin } from "../../main.ts";
import type { Bodies, ForkBody } from "./bodies.ts";
import {
  ask,
  decide,
  existing,
  failure,
  featured,
  invalidState,
  read,
  type Registry,
  removeNow,
  step,
} from "./lifecycle.ts";
import { nameConflict } from "./records.ts";

/** Makes new instances, from bodies and from other instances. What fails half-way leaves nothing behind. */
export class Creation {
  readonly #registry: Registry;
  readonly #bodies: Bodies;
  /** Names of creations that have not reached their row yet. */
  readonly #reserved = new Set<string>();

  constructor(registry: Registry, bodies: Bodies) {
    this.#registry = registry;
    this.#bodies = bodies;
  }

  create(body: unknown, origin: Origin, defaultDriver: string): Promise<Instance> {
    const draft = this.#bodies.create(body, { now: this.#registry.now(), defaultDriver });
    const driver = this.#registry.driver(draft.driver);
    return this.#reserving(draft, async (signal) => {
      await ask(this.#registry, "create", draft, origin, signal);
      await driver.validate(draft);
      const instance = this.#insert({ ...draft, transition: "create" }, "create", origin);
      return await this.#orRemove(instance, "create", async () => {
        await driver.create(instance);
        const state = await driver.start(instance, signal);
        const fields = { state, transition: null, started_at: this.#registry.now() };
        return this.#registry.records.update(instance.id, fields, { action: "start", origin });
      });
    });
  }

  /** A copy of a stopped or sleeping instance; a running one is put to standby for it and restored when `from_running`. */
  fork(id: string, body: unknown, origin: Origin): Promise<Instance> {
    const wanted = this.#bodies.fork(body);
    const registry = this.#registry;
    return registry.lanes.enter(id, "fork", async (signal) => {
      let { instance: source } = await decide(registry, id, "fork");
      const driver = featured(registry.driver(source.driver), "fork");
      const wasRunning = source.state === "Running";
      if (wasRunning && !wanted.from_running) throw invalidState("fork", source);
      await ask(registry, "fork", source, origin, signal);
      if (wasRunning) source = await this.#sleep(driver, source, signal, origin);
      try {
        return await this.#copy(driver, source, wanted, origin);
      } finally {
        if (wasRunning) await this.#wake(driver, source, signal, origin);
      }
    }, { joins: false });
  }

  async #sleep(driver: Driver, source: Instance, signal: AbortSignal, origin: Origin): Promise<Instance> {
    await featured(driver, "standby").standby!(source, signal);
    return this.#registry.records.update(source.id, { state: "Standby" }, {
      action: "state",
      origin,
      detail: { for: "fork" },
    });
  }

  async #wake(driver: Driver, source: Instance, signal: AbortSignal, origin: Origin): Promise<void> {
    const state = await driver.restore!(source, signal);
    this.#registry.records.update(source.id, { state }, { action: "state", origin, detail: { for: "fork" } });
  }

  async #copy(driver: Driver, source: Instance, wanted: ForkBody, origin: Origin): Promise<Instance> {
    const registry = this.#registry;
    const draft = this.#bodies.forked(source, { name: wanted.name, now: registry.now() });
    const target = await this.#reserving(draft, async () => {
      const row = this.#insert({ ...draft, transition: "fork" }, "fork", {
        ...origin,
        detail: { ...origin.detail, source: source.id },
      });
      return await this.#orRemove(row, "fork", async () => {
        await driver.fork!(source, row);
        const reading = await read(registry, row);
        const state = reading.state === "Unknown" ? source.state : reading.state;
        return registry.records.update(row.id, { state, transition: null }, { action: "state", origin });
      });
    });
    const target_state = wanted.target_state ?? target.state;
    if (target_state === "Running") {
      return await step(registry, target.id, target.state === "Standby" ? "restore" : "start", origin);
    }
    if (target_state === "Stopped") return await step(registry, target.id, "stop", origin);
    if (target.state !== "Standby") {
      const running = await step(registry, target.id, "start", origin);
      return await step(registry, running.id, "standby", origin);
    }
    return target;
  }

  /** Holds the name from now until there is a row, so that two creations of one name never both begin. */
  async #reserving(draft: Instance, work: (signal: AbortSignal) => Promise<Instance>): Promise<Instance> {
    if (this.#reserved.has(draft.name) || this.#registry.records.named(draft.name)) throw nameConflict(draft.name);
    this.#reserved.add(draft.name);
    try {
      return await this.#registry.lanes.enter(draft.id, "create", work);
    } finally {
      this.#reserved.delete(draft.name);
    }
  }

  #insert(draft: Instance, action: "create" | "fork", origin: Origin): Instance {
    const { records, network } = this.#registry;
    const wired = draft.network.enabled && network?.enabled;
    return records.insert(draft, { action, origin }, () => {
      const address = wired ? network.allocate(draft.id) : { ip: null, mac: null };
      return { network: { enabled: Boolean(wired), ...address } };
    });
  }

  async #orRemove(instance: Instance, request: "create" | "fork", work: () => Promise<Instance>): Promise<Instance> {
    try {
      return await work();
    } catch (error) {
      await removeNow(this.#registry, existing(this.#registry, instance.id), {
        actor: "system",
        cause: `${request}_failed`,
      });
      throw failure(request, instance, error);
    }
  }
}
