/**
 * What a host with a journal does when much happens. As a program, a host that kills itself (SIGKILL) in the middle of
 * it: `storm.ts FOLDER POINT COUNT`, at the COUNTth time that it comes to the point.
 */
import process from "node:process";
import * as v from "valibot";
import {
  definePlugin,
  type Extension,
  type Host,
  type Hypervisor,
  loadPlugins,
  type Plugin,
  startHost,
} from "../../main.ts";
import hypervisor from "../../plugins/hypervisor/mod.ts";
import journal from "../../plugins/journal/mod.ts";
import { HOST_DEFAULTS } from "../../plugins/shared/config.ts";
import store from "../../plugins/store.ts";
import { ORIGIN, ScriptedDriver } from "../hypervisor/scripted.ts";
import { KINDS } from "./world.ts";

/** Where a host can be killed: around the journal's own hooks, and around each statement that the store is given. */
export const POINTS = [
  "first",
  "before",
  "after",
  "note-first",
  "note-before",
  "note-after",
  "within",
  "told",
] as const;

export interface Stormy {
  /** Instances with their changes and notes, again and again, until it is told to end. */
  storm(rounds: number): Promise<void>;
}

/** A plugin with the scripted driver and a field, for storms; `at` is called at each point. */
export function stormy(given: Partial<Stormy & { host: Host }>, at: (point: (typeof POINTS)[number]) => void): Plugin {
  return definePlugin({
    name: "stormy",
    requires: ["store", "hypervisor"],
    setup(host) {
      const registry = host.use("hypervisor");
      registry.register(new ScriptedDriver());
      registry.declareNotes(KINDS);
      const said = registry.extend<string, { n: number }>({ field: "said", schema: v.string() });
      // The journal's hooks are the last of their priority and those above.
      const { hooks } = host;
      hooks.commit("instance:commit", () => at("first"), { priority: Infinity });
      hooks.commit("instance:commit", () => at("before"), { priority: -1 });
      hooks.commit("instance:commit", () => at("after"), { priority: -Infinity });
      hooks.commit("note:commit", () => at("note-first"), { priority: Infinity });
      hooks.commit("note:commit", () => at("note-before"), { priority: -1 });
      hooks.commit("note:commit", () => at("note-after"), { priority: -Infinity });
      hooks.on("instance:event", () => at("told"));
      given.host = host;
      given.storm = (rounds) => storm(registry, said, at, rounds);
    },
  }) as Plugin;
}

async function storm(
  registry: Hypervisor,
  said: Extension<string, { n: number }>,
  at: (point: "within") => void,
  rounds: number,
): Promise<void> {
  const life = async (name: string, n: number) => {
    const { id } = await registry.create({ name, image: "any" }, ORIGIN);
    registry.note(id, { type: "test:note", origin: ORIGIN, summary: "Said", detail: { n } }, () => {
      said.save(id, { n });
      at("within");
    });
    await registry.update(id, { tags: { n: String(n) } }, ORIGIN);
    await registry.standby(id, ORIGIN);
    await registry.restore(id, ORIGIN);
    if (n % 2 === 0) await registry.delete(id, ORIGIN);
    else await registry.stop(id, ORIGIN);
  };
  for (let n = 0; n < rounds; n += 2) {
    const name = `s${process.pid}-${n}`;
    await Promise.all([life(`${name}a`, n), life(`${name}b`, n + 1)]);
  }
}

if (import.meta.main) {
  const [folder, point, count] = process.argv.slice(2);
  let left = Number(count);
  const at = (where: string) => void (where === point && --left === 0 && process.kill(process.pid, "SIGKILL"));
  const given: Partial<Stormy> = {};
  const plugins = [store, hypervisor, journal, stormy(given, at)] as Plugin[];
  const config = {
    dataDir: folder,
    host: HOST_DEFAULTS,
    plugins: plugins.map(({ name }) => ({
      name,
      options: name === "hypervisor" ? { default_driver: "scripted" } : {},
    })),
  };
  const all = new Map(plugins.map((plugin) => [plugin.name, plugin]));
  await startHost(config, await loadPlugins(config, { given: all }));
  console.log("storm");
  await given.storm!(100_000);
}
