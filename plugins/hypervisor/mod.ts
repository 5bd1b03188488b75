/**
 * The registry of instances. `states.ts` holds the rules, `lanes.ts` the locks, `records.ts` the rows, `bodies.ts` what
 * comes in and `present.ts` what goes out, `fields.ts` what other plugins add to both; `lifecycle.ts` and `creation.ts`
 * are the actions, `override.ts` what one standby has of its own; `recovery.ts`, `expiry.ts` and `wait.ts` act on what
 * happens by itself.
 */
import { isDeepStrictEqual } from "node:util";
import * as v from "valibot";
import {
  definePlugin,
  DormouseError,
  type Driver,
  type Feature,
  type Host,
  type Hypervisor,
  type Instance,
  type NoteKind,
} from "../../main.ts";
import { deadline } from "../shared/async.ts";
import { messageOf } from "../shared/errors.ts";
import { didYouMean } from "../shared/nearest.ts";
import { duration } from "../shared/schemas.ts";
import { Bodies } from "./bodies.ts";
import { Creation } from "./creation.ts";
import { Reaper } from "./expiry.ts";
import { Fields } from "./fields.ts";
import { Lanes } from "./lanes.ts";
import { ask, existing, featured, type Registry, remove, step, told, validate } from "./lifecycle.ts";
import { overridden } from "./override.ts";
import { Presenter } from "./present.ts";
import { Readings } from "./reading.ts";
import { Records } from "./records.ts";
import { adoptAll, look, Reconciler } from "./recovery.ts";
import { Waiting } from "./wait.ts";

/** Milliseconds that a driver stays for what is under way with it, while the host closes. */
const LEAVE_WITHIN = 12_000;

const Options = v.object({
  /** The driver of instances whose body names none. */
  default_driver: v.optional(v.string(), "process"),
  reconcile_interval: v.optional(duration({ min: 100 }), "5s"),
});
type Options = v.InferOutput<typeof Options>;

export default definePlugin({
  name: "hypervisor",
  requires: ["store", "network?"],
  provides: ["hypervisor"],
  options: Options,
  setup(host, options) {
    host.provide("hypervisor", createHypervisor(host, options));
  },
});

function createHypervisor(host: Host, options: Options): Hypervisor {
  const { hooks, log } = host;
  const store = host.use("store");
  const drivers = new Map<string, Driver>();
  const noteKinds = new Map<string, NoteKind>();
  const fields = new Fields(store);
  const registry: Registry = {
    records: new Records(store, hooks),
    lanes: new Lanes(),
    readings: new Readings((name) => driverNamed(drivers, name)),
    fields,
    hooks,
    network: host.find("network"),
    driver: (name) => driverNamed(drivers, name),
    closing: host.signal,
    now: Date.now,
  };
  const { records, lanes } = registry;
  const bodies = new Bodies(fields);
  const creation = new Creation(registry, bodies);
  const presenter = new Presenter(fields, registry.now);
  const waiting = new Waiting(registry, hooks, log);
  const reaper = new Reaper(registry, log);

  host.defer(() => lanes.close());
  host.defer(() => waiting[Symbol.dispose]());
  host.defer(() => reaper[Symbol.dispose]());
  hooks.guard("host:ready", async () => {
    await adoptAll(registry, log);
    const reconciler = new Reconciler(registry, log, { interval: options.reconcile_interval });
    host.defer(() => reconciler[Symbol.dispose]());
    // From then on drivers go one by one, and what is theirs is not unknown for that.
    host.signal.addEventListener("abort", () => [reconciler, reaper].forEach((each) => each[Symbol.dispose]()));
    reaper.sweep();
  }, { priority: 100, timeout: 120_000 });

  return {
    register(driver) {
      if (drivers.has(driver.name)) throw new TypeError(`Cannot register driver "${driver.name}": the name is taken`);
      drivers.set(driver.name, driver);
      const undo = () => void drivers.delete(driver.name);
      // One that is not there yet is being made, by any of them.
      const ours = (id: string) => [undefined, driver.name].includes(records.find(id)?.driver);
      const ended = () => deadline(lanes.settled(ours), LEAVE_WITHIN, `What is under way with "${driver.name}"`);
      return { [Symbol.dispose]: undo, [Symbol.asyncDispose]: () => ended().finally(undo) };
    },
    drivers: () => [...drivers.values()],
    defaultDriver: options.default_driver,
    driverOf: <F extends Feature>(instance: Instance, feature?: F) =>
      featured(registry.driver(instance.driver), feature) as Driver & Required<Pick<Driver, F & keyof Driver>>,
    extend: (extension) => fields.extend(extension, (id) => records.find(id) !== undefined),
    resolve: (reference) => records.resolve(reference),
    find: (id) => records.find(id),
    list({ state, tags = {} } = {}) {
      const wanted = Object.entries(tags);
      if (state === undefined && wanted.length === 0) return records.all();
      return records.all().filter((instance) =>
        (state === undefined || instance.state === state) &&
        wanted.every(([tag, value]) => Object.hasOwn(instance.tags, tag) && instance.tags[tag] === value)
      );
    },
    async create(body, origin) {
      const instance = await creation.create(body, origin, options.default_driver);
      if (instance.expires_at !== null) reaper.sweep();
      return instance;
    },
    update(id, body, origin) {
      const now = registry.now();
      return lanes.enter(id, "update", async (signal) => {
        const instance = existing(registry, id);
        const changed = bodies.update(instance, body, { now });
        if (changesNothing(instance, changed)) return instance;
        return await told(registry, "update", instance, origin, async () => {
          const wanted = { ...instance, ...changed };
          if (!changesNothing(instance, { env: wanted.env })) await refuseUnrunnable(registry, instance, wanted);
          await ask(registry, "update", instance, origin, signal, wanted);
          const detail = { fields: Object.keys(body as object) };
          const updated = records.update(id, changed, { action: "update", origin, detail });
          if (changed.expires_at !== undefined) reaper.sweep();
          return updated;
        });
      }, { joins: false });
    },
    start: (id, origin, override) => step(registry, id, "start", origin, override),
    stop: (id, origin) => step(registry, id, "stop", origin),
    pause: (id, origin) => step(registry, id, "pause", origin),
    resume: (id, origin) => step(registry, id, "resume", origin),
    async standby(id, origin, request = {}) {
      const seen = overridden(fields, existing(registry, id), request);
      return await step(registry, id, "standby", origin, undefined, seen);
    },
    restore: (id, origin) => step(registry, id, "restore", origin),
    fork: (id, body, origin) => creation.fork(id, body, origin),
    delete: (id, origin) => remove(registry, id, origin),
    declareNotes(kinds) {
      const types = Object.keys(kinds);
      const taken = types.find((type) => noteKinds.has(type));
      if (taken) throw new TypeError(`Cannot declare notes of type "${taken}": the type is taken`);
      for (const type of types) noteKinds.set(type, kinds[type]);
      return { [Symbol.dispose]: () => types.forEach((type) => noteKinds.delete(type)) };
    },
    noteKinds: () => noteKinds,
    note(id, draft, within) {
      const kind = noteKinds.get(draft.type);
      if (!kind) throw new TypeError(`Cannot note "${draft.type}": nobody has declared the type`);
      const instance = records.find(id);
      return instance && records.note(instance, draft, kind.event ?? draft.type, within);
    },
    changed(id, cause) {
      look(registry, id, cause).catch((error) => {
        log.warn("Looking at instance {id} failed: {reason}", { id, reason: messageOf(error), error });
      });
    },
    wait: (id, target, waitOptions) => waiting.wait(id, target, waitOptions),
    schemas: () => ({ ...bodies.schemas(), instance: presenter.schema() }),
    present: (instance) => presenter.present(instance),
    presentJson: (instance) => presenter.presentJson(instance),
  };
}

function changesNothing(instance: Instance, changed: Partial<Instance>): boolean {
  return Object.entries(changed).every(([field, value]) => isDeepStrictEqual(value, instance[field as keyof Instance]));
}

/**
 * What its driver could not run is refused now, and not by a start some day; unless that could not run it before either.
 *
 * @throws {DormouseError} the driver's own
 */
async function refuseUnrunnable(registry: Registry, instance: Instance, wanted: Instance): Promise<void> {
  const checked = async (each: Instance) => void await validate(registry.driver(each.driver), each, "update");
  try {
    await checked(wanted);
  } catch (error) {
    if (await checked(instance).then(() => true, () => false)) throw error;
  }
}

function driverNamed(drivers: Map<string, Driver>, name: string): Driver {
  const driver = drivers.get(name);
  if (driver) return driver;
  const loaded = [...drivers.keys()].map((known) => `"${known}"`).join(", ") || "none";
  const message = `No driver "${name.slice(0, 100)}"${didYouMean(name, drivers.keys())}: loaded is ${loaded}`;
  throw new DormouseError("unknown_driver", message);
}
