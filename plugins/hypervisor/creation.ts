import { DormouseError, type Driver, type Instance, type Origin, type State } from "../../main.ts";
import { delay } from "../shared/async.ts";
import { messageOf } from "../shared/errors.ts";
import type { Bodies } from "./bodies.ts";
import {
  ask,
  decide,
  existing,
  failure,
  featured,
  invalidState,
  type Registry,
  removeNow,
  stepNow,
  told,
  validate,
} from "./lifecycle.ts";
import { commitReading } from "./reading.ts";
import { nameConflict } from "./records.ts";

/** Milliseconds between two looks at whether a copy runs that is to be put to sleep, and for it to be so. */
const [READY_MS, READY_WITHIN] = [100, 300_000];

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

  async create(body: unknown, origin: Origin, defaultDriver: string): Promise<Instance> {
    const draft = this.#bodies.create(body, { now: this.#registry.now(), defaultDriver });
    const driver = this.#registry.driver(draft.driver);
    const made = () =>
      this.#reserving(draft.name, () =>
        this.#registry.lanes.enter(draft.id, "create", async (signal) => {
          const sized = await validate(driver, draft, "create");
          await ask(this.#registry, "create", sized, origin, signal);
          const instance = this.#insert(sized, "create", origin);
          return await this.#orRemove(instance, "create", async () => {
            await driver.create(instance);
            const state = await driver.start(instance, signal);
            const fields = { state, transition: null, started_at: this.#registry.now() };
            return this.#registry.records.update(instance.id, fields, { action: "start", origin });
          });
        }));
    return await told(this.#registry, "create", draft, origin, made);
  }

  /** A copy of a stopped or sleeping instance; a running one is put to standby for it and restored when `from_running`. */
  async fork(id: string, body: unknown, origin: Origin): Promise<Instance> {
    const wanted = this.#bodies.fork(body);
    const registry = this.#registry;
    return await registry.lanes.enter(id, "fork", async (signal) => {
      const { instance: source } = await decide(registry, id, "fork");
      return await told(registry, "fork", source, origin, () => this.#forkOf(source, wanted, origin, signal));
    }, { joins: false });
  }

  async #forkOf(source: Instance, wanted: ReturnType<Bodies["fork"]>, origin: Origin, signal: AbortSignal) {
    const registry = this.#registry;
    const driver = featured(registry.driver(source.driver), "fork");
    const runs = source.state === "Running";
    if (runs && !wanted.from_running) throw invalidState("fork", source, '; "from_running": true copies it');
    if (runs) featured(driver, "standby");
    await ask(registry, "fork", source, origin, signal);
    const draft = this.#bodies.forked(source, { name: wanted.name, now: registry.now() });
    // Before the source is put to sleep, which a name that is taken is no reason for.
    return await this.#reserving(draft.name, () => {
      const copy = (from: Instance) => this.#copy(driver, from, draft, origin, wanted.target_state);
      return runs ? this.#asleep(driver, source, origin, signal, copy) : copy(source);
    });
  }

  /** Puts a running instance to standby for `work`; it runs again afterwards, whatever became of that. */
  async #asleep(
    driver: Driver,
    source: Instance,
    origin: Origin,
    signal: AbortSignal,
    work: (asleep: Instance) => Promise<Instance>,
  ): Promise<Instance> {
    const { records, readings } = this.#registry;
    const change = { action: "state", origin, detail: { for: "fork" } } as const;
    // The mark stays until it runs again, so that the host after one that died on the way wakes it.
    let current = records.update(source.id, { state: "Paused", transition: "fork" }, change);
    try {
      await driver.standby!(current, signal);
      const asleep = current = records.update(source.id, { state: "Standby" }, change);
      const [made] = await Promise.allSettled([work(asleep)]);
      const state = await driver.restore!(asleep, signal).catch((error) => {
        const lost = made.status === "fulfilled" ? `copied to "${made.value.name}", but` : `${messageOf(made.reason)};`;
        throw new Error(`${lost} it could not be restored: ${messageOf(error)}`, { cause: error });
      });
      records.update(source.id, { state, transition: null }, change);
      if (made.status === "rejected") throw made.reason;
      return made.value;
    } catch (error) {
      if (existing(this.#registry, source.id).transition === "fork") {
        const reading = await readings.read(current);
        const failed = { ...origin, cause: "fork_failed" };
        commitReading(this.#registry, existing(this.#registry, source.id), reading, failed, {
          error: messageOf(error),
        });
      }
      throw failure("fork", source, error);
    }
  }

  async #copy(
    driver: Driver,
    source: Instance,
    draft: Instance,
    origin: Origin,
    wanted: Exclude<State, "Unknown"> | undefined,
  ): Promise<Instance> {
    const registry = this.#registry;
    // The lane is held until the copy is as it is wanted: nobody gets hold of one that may yet be undone.
    return await registry.lanes.enter(draft.id, "create", async (signal) => {
      const detail = { ...origin.detail, source: source.id };
      const row = this.#insert(draft, "fork", { ...origin, detail });
      return await this.#orRemove(row, "fork", async () => {
        await driver.fork!(source, row);
        const reading = await registry.readings.read(row);
        if (reading.state === "Unknown") throw new Error(reading.error);
        const { state } = reading;
        const done = wanted === undefined || wanted === state;
        const transition = done ? null : "create";
        const target = registry.records.update(row.id, { state, transition }, { action: "state", origin });
        if (done) return target;
        const to = (request: "start" | "stop" | "standby" | "restore", making: "on" | "last" = "last") =>
          stepNow(registry, row.id, request, origin, { signal, making });
        if (wanted === "Running") return await to(state === "Standby" ? "restore" : "start");
        if (wanted === "Stopped") return await to("stop");
        await this.#ready(await to("start", "on"), origin, signal);
        return await to("standby");
      });
    });
  }

  /** Resolves once it runs. That it does is told to its lane, which is held here: so it is looked at until then. */
  async #ready(started: Instance, origin: Origin, given: AbortSignal): Promise<void> {
    const { readings, records, closing } = this.#registry;
    const signal = AbortSignal.any([given, closing, AbortSignal.timeout(READY_WITHIN)]);
    for (let state: State = started.state; state !== "Running";) {
      ({ state } = await readings.read(started));
      if (state === "Running") records.update(started.id, { state }, { action: "state", origin });
      else if (state !== "Initializing" && state !== "Unknown") throw new Error(`it is ${state} after its start`);
      else await delay(READY_MS, { signal });
    }
  }

  /** Holds the name from now until there is a row, so that two creations of one name never both begin. */
  async #reserving(name: string, work: () => Promise<Instance>): Promise<Instance> {
    if (this.#reserved.has(name) || this.#registry.records.named(name)) throw nameConflict(name);
    this.#reserved.add(name);
    try {
      return await work();
    } finally {
      this.#reserved.delete(name);
    }
  }

  #insert(draft: Instance, action: "create" | "fork", origin: Origin): Instance {
    const { records, network } = this.#registry;
    const wired = draft.network.enabled && network?.enabled;
    return records.insert({ ...draft, transition: "create" }, { action, origin }, () => {
      const address = wired ? network.allocate(draft.id) : { ip: null, mac: null, ip6: null };
      return { network: { enabled: Boolean(wired), ...address } };
    });
  }

  async #orRemove(instance: Instance, request: "create" | "fork", work: () => Promise<Instance>): Promise<Instance> {
    try {
      return await work();
    } catch (error) {
      const failed = failure(request, instance, error);
      try {
        await removeNow(this.#registry, existing(this.#registry, instance.id), {
          actor: "system",
          cause: `${request}_failed`,
        });
      } catch (second) {
        // The row tells the reconcile that it is to go. Why it was not made is what the caller has to know.
        const message = `${failed.message}; what is left of it goes later: ${messageOf(second)}`;
        throw new DormouseError(failed.code, message, {
          cause: new AggregateError([error, second]),
          ...(failed.details && { details: failed.details }),
        });
      }
      throw failed;
    }
  }
}
