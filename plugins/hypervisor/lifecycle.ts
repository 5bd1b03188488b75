import type { Action, ActionDone, Driver, Feature, Instance, Network, Origin, PluginHooks, State } from "../../main.ts";
import { DormouseError } from "../../main.ts";
import { abortable } from "../shared/async.ts";
import { messageOf } from "../shared/errors.ts";
import type { Fields } from "./fields.ts";
import type { Lanes } from "./lanes.ts";
import { commitReading, type Readings } from "./reading.ts";
import { notFound, type Records } from "./records.ts";
import { type Request, RULES, UNDER_WAY } from "./states.ts";

/** What the turns of all instances share. */
export interface Registry {
  readonly records: Records;
  readonly lanes: Lanes;
  readonly readings: Readings;
  readonly fields: Fields;
  readonly hooks: PluginHooks;
  readonly network: Network | undefined;
  driver(name: string): Driver;
  /** Aborts when the host closes. */
  readonly closing: AbortSignal;
  now(): number;
}

type Step = "start" | "stop" | "pause" | "resume" | "standby" | "restore";
interface StepOptions {
  signal: AbortSignal;
  change?: Partial<Instance> | undefined;
  seen?: Partial<Instance> | undefined;
  /** The instance is being made by this step, `"on"` by others after it: who finds it half done removes it. */
  making?: "on" | "last";
}
type Outcome = Partial<Instance> & { state: State };

/** How each step is carried out by a driver, and what it makes of the instance. */
const STEPS = {
  start: async (driver, instance, signal, now) => {
    const state = await driver.start(instance, signal);
    return { state, started_at: now(), stopped_at: null, exit_code: null, exit_message: null };
  },
  stop: async (driver, instance, signal, now) => {
    const exit = await driver.stop(instance, signal);
    return { state: "Stopped", stopped_at: now(), ...exit };
  },
  pause: async (driver, instance) => (await driver.pause!(instance), { state: "Paused" }),
  resume: async (driver, instance) => (await driver.resume!(instance), { state: "Running" }),
  standby: async (driver, instance, signal) => (await driver.standby!(instance, signal), { state: "Standby" }),
  // A fork of one that slept has never been started before.
  restore: async (driver, instance, signal, now) => {
    const state = await driver.restore!(instance, signal);
    return { state, started_at: instance.started_at ?? now() };
  },
} satisfies Record<Step, (d: Driver, i: Instance, signal: AbortSignal, now: () => number) => Promise<Outcome>>;

const NEEDS: Record<Step, Feature | undefined> = {
  start: undefined,
  stop: undefined,
  pause: "pause",
  resume: "pause",
  standby: "standby",
  restore: "standby",
};

/**
 * Takes an instance through one step, in its lane: rules, guards, a row that says it began, the driver, the result.
 * `change` is laid over the instance first, and kept; `seen` is laid over what the driver sees of it. A request with either
 * joins no other.
 */
export function step(
  registry: Registry,
  id: string,
  request: Step,
  origin: Origin,
  change?: Partial<Instance>,
  seen?: Partial<Instance>,
): Promise<Instance> {
  const turn = (signal: AbortSignal) => stepNow(registry, id, request, origin, { signal, change, seen });
  return registry.lanes.enter(id, request, turn, { joins: change === undefined && seen === undefined });
}

/** The step itself, for those who hold the lane already. */
export async function stepNow(
  registry: Registry,
  id: string,
  request: Step,
  origin: Origin,
  options: StepOptions,
): Promise<Instance> {
  const decided = await decide(registry, id, request, options);
  if (decided.done) {
    await registry.hooks.ask("action:fulfilled", { action: request, instance: decided.instance, origin });
    return decided.instance;
  }
  const work = () => carryOut(registry, decided.instance, request, origin, options);
  return await told(registry, request, decided.instance, origin, work);
}

async function carryOut(
  registry: Registry,
  before: Instance,
  request: Step,
  origin: Origin,
  { signal, change, seen, making }: StepOptions,
): Promise<Instance> {
  const { records, readings, now } = registry;
  const { id } = before;
  const driver = featured(registry.driver(before.driver), NEEDS[request]);
  await ask(registry, request, before, origin, signal);
  if (change) await validate(driver, { ...before, ...change }, request);
  const underWay = UNDER_WAY[request];
  // Before anything is done, so that a host that dies here finds out from the row what it was about.
  const instance = underWay === null ? before : records.update(id, {
    ...change,
    ...readdressed(registry, before, request),
    state: underWay,
    transition: making ? "create" : request,
  }, { action: "state", origin });
  try {
    const outcome = await STEPS[request](driver, seen ? { ...instance, ...seen } : instance, signal, now);
    const transition = making === "on" ? "create" : null;
    return records.update(id, { ...outcome, transition, state_error: null }, { action: request, origin });
  } catch (error) {
    if (making) throw failure(request, instance, error); // it is removed
    const cause = signal.aborted ? `${request}_aborted` : `${request}_failed`;
    const reading = await readings.read(instance);
    commitReading(registry, instance, reading, { ...origin, cause }, { error: messageOf(error) });
    throw failure(request, instance, error);
  }
}

/** Does the work of an action, and tells how that went and how long it took. */
export async function told<T>(
  { hooks }: Registry,
  action: Action,
  { id: instance_id, driver }: Instance,
  { actor }: Origin,
  work: () => Promise<T>,
): Promise<T> {
  const began = performance.now();
  const tell = (result: ActionDone["result"]) => {
    const duration_ms = performance.now() - began;
    hooks.publish("action:done", { action, instance_id, driver, result, duration_ms, actor });
  };
  try {
    const value = await work();
    tell("ok");
    return value;
  } catch (error) {
    const known = error instanceof DormouseError ? error : undefined;
    tell(known?.code === "aborted" ? "aborted" : known && known.status < 500 ? "refused" : "failed");
    throw error;
  }
}

/** A start gives it the addresses of today: that of IPv6 comes and goes with the config, and with the machine. */
function readdressed({ network }: Registry, instance: Instance, request: Step): Partial<Instance> {
  if (request !== "start" || !network?.enabled || instance.network.ip === null) return {};
  return { network: { ...instance.network, ...network.allocate(instance.id) } };
}

/** Ends an instance at once and removes all that is its own. What fails is tried again by the next reconcile. */
export function remove(registry: Registry, id: string, origin: Origin): Promise<void> {
  return registry.lanes.enter(id, "delete", async (signal) => {
    const instance = existing(registry, id);
    await told(registry, "delete", instance, origin, async () => {
      if (instance.transition !== "delete") await ask(registry, "delete", instance, origin, signal);
      await removeNow(registry, instance, origin);
    });
  });
}

/** The deletion itself, for those who hold the lane already. */
export async function removeNow(registry: Registry, instance: Instance, origin: Origin): Promise<void> {
  const { records, network, fields, readings } = registry;
  const driver = registry.driver(instance.driver);
  if (instance.transition !== "delete") {
    const state = instance.state === "Stopped" ? instance.state : UNDER_WAY.delete;
    records.update(instance.id, { state, transition: "delete" }, { action: "state", origin });
  }
  try {
    await driver.delete(existing(registry, instance.id));
  } catch (error) {
    throw failure("delete", instance, error);
  }
  records.remove(instance.id, { action: "delete", origin }, () => network?.release(instance.id));
  fields.forget(instance.id);
  readings.forget(instance.id);
}

/** The instance with the size that it gets. @throws {DormouseError} the driver's own, or `driver_failed` where it broke */
export async function validate(driver: Driver, instance: Instance, request: string): Promise<Instance> {
  try {
    const { vcpus, memory_bytes } = await driver.validate(instance) ?? instance;
    return { ...instance, vcpus, memory_bytes };
  } catch (error) {
    throw failure(request, instance, error);
  }
}

/** The instance as it is now, and whether the request is fulfilled already. An `Unknown` is looked at once more first. */
export async function decide(
  registry: Registry,
  id: string,
  request: Request,
  { making }: Pick<StepOptions, "making"> = {},
): Promise<{ instance: Instance; done: boolean }> {
  let instance = existing(registry, id);
  // What is half removed must neither run again nor have its removal forgotten.
  if (isDoomed(instance) && request !== "delete" && !making) throw invalidState(request, instance);
  if (instance.state === "Unknown" && RULES[request].Unknown === "refuse") {
    const reading = await registry.readings.read(instance);
    instance = commitReading(registry, instance, reading, { actor: "system", cause: `before_${request}` });
  }
  const rule = RULES[request][instance.state];
  if (rule === "refuse") throw invalidState(request, instance);
  return { instance, done: rule === "done" };
}

/** Whether all that is left to do with the instance is to remove it: its deletion began, or its creation did not end. */
export function isDoomed({ transition }: Instance): boolean {
  return transition === "delete" || transition === "create";
}

/** Asks the guards of an action, until the action is overtaken. */
export async function ask(
  registry: Registry,
  request: Request | "create",
  instance: Instance,
  origin: Origin,
  signal: AbortSignal,
  updated?: Instance,
) {
  // A guard that is late or was overtaken goes on by itself; this tells it that nobody waits for it any more.
  const given = new AbortController();
  const context = { instance, origin, signal: AbortSignal.any([signal, given.signal]), ...(updated && { updated }) };
  try {
    await abortable(registry.hooks.ask(`before:${request}`, context), signal);
  } catch (error) {
    given.abort(error);
    throw error;
  }
}

/** The driver, if it has the feature. @throws {DormouseError} `not_supported` */
export function featured(driver: Driver, feature: Feature | undefined): Driver {
  if (feature === undefined || driver.features.has(feature)) return driver;
  const message = `Cannot use "${feature}": driver "${driver.name}" does not support it`;
  throw new DormouseError("not_supported", message, { details: { driver: driver.name, feature } });
}

export function existing({ records }: Registry, id: string): Instance {
  const instance = records.find(id);
  if (!instance) throw notFound(id);
  return instance;
}

export function invalidState(request: string, instance: Instance, hint = ""): DormouseError {
  const { name, state } = instance;
  const why = isDoomed(instance) ? "it is being removed" : instance.state_error;
  const reason = why === null ? "" : ` (${why})`;
  return new DormouseError("invalid_state", `Cannot ${request} instance "${name}": state is ${state}${reason}${hint}`);
}

export function failure(request: string, { name }: Instance, error: unknown): DormouseError {
  if (error instanceof DormouseError) return error;
  return new DormouseError("driver_failed", `Cannot ${request} instance "${name}": ${messageOf(error)}`, {
    cause: error,
  });
}
