import { readdirSync } from "node:fs";
import { isAbsolute } from "node:path";
import { pathToFileURL } from "node:url";
import type { Plugin } from "../../main.ts";
import { FLAGS } from "./arguments.ts";
import { pluginFile } from "./config.ts";
import { DormouseError, messageOf } from "./errors.ts";
import { didYouMean } from "./nearest.ts";

/**
 * Imports the module of a plugin and checks its shape, for which no type can vouch.
 *
 * @throws {DormouseError} `plugin_unknown` where there is none or it does not load, `plugin_invalid` with what is wrong
 */
export async function importPlugin(folder: string, name: string, use: string | undefined): Promise<Plugin> {
  const specifier = use ?? pluginFile(folder, name);
  if (specifier === undefined) {
    const names = readdirSync(folder).filter((entry) => entry !== "shared").map((entry) => entry.replace(/\.ts$/, ""));
    const hint = didYouMean(name, names) || `; one of your own needs use = "./${name}.ts"`;
    throw new DormouseError("plugin_unknown", `No plugin "${name}" in ${folder}${hint}`);
  }
  let module: { default?: unknown };
  try {
    module = await import(isAbsolute(specifier) ? pathToFileURL(specifier).href : specifier);
  } catch (error) {
    const hint = /^[\w.-]+\/.*\.[cm]?[jt]s$/.test(specifier) ? ` (a path starts with "./")` : "";
    const message = `Cannot load plugin "${name}" from ${specifier}${hint}: ${messageOf(error)}`;
    throw new DormouseError("plugin_unknown", message, { cause: error });
  }
  const plugin = module.default as Partial<Plugin> | undefined;
  const wrong = (what: string) => new DormouseError("plugin_invalid", `Plugin "${name}" of ${specifier}: ${what}`);
  if (typeof plugin !== "object" || plugin === null) throw wrong("its default export is not an object");
  if (typeof plugin.setup !== "function") throw wrong("setup is not a function");
  if (plugin.name !== name && use === undefined) throw wrong(`its name is "${plugin.name}"`);
  if (plugin.options && typeof plugin.options["~standard"]?.validate !== "function") {
    throw wrong("options is not a Standard Schema");
  }
  for (const list of ["requires", "provides"] as const) {
    const names: unknown = plugin[list] ?? [];
    if (!Array.isArray(names) || names.some((each) => typeof each !== "string")) {
      throw wrong(`${list} is not a list of names`);
    }
  }
  if (plugin.commands !== undefined && typeof plugin.commands !== "object") throw wrong("commands is not a table");
  for (const [command, each] of Object.entries(plugin.commands ?? {})) {
    if (typeof each?.help !== "string" || typeof each.run !== "function") {
      throw wrong(`commands.${command} lacks help or run`);
    }
    if (Object.hasOwn(FLAGS, command)) throw wrong(`commands.${command} is the host's own`);
  }
  // Not a spread, which would lose the methods of a plugin that is an object of a class.
  const { requires, provides, options, commands } = plugin;
  return { name, requires, provides, options, commands, setup: (host, given) => plugin.setup!(host, given) };
}

/**
 * The plugins so that each comes after those whose services it requires, and else as they were given.
 *
 * @throws {DormouseError} `plugin_missing`, `plugin_cycle`, or `plugin_duplicate` for a service or a command
 */
export function inOrder<L extends { plugin: Plugin }>(loaded: L[]): L[] {
  const providers = new Map<string, L>();
  for (const each of loaded) {
    for (const service of each.plugin.provides ?? []) {
      const [a, b] = [providers.get(service)?.plugin.name, each.plugin.name];
      if (a) throw new DormouseError("plugin_duplicate", `Plugins "${a}" and "${b}" both provide "${service}"`);
      providers.set(service, each);
    }
  }
  const owners = new Map<string, string>();
  for (const { plugin } of loaded) {
    for (const command of Object.keys(plugin.commands ?? {})) {
      const [a, b] = [owners.get(command), plugin.name];
      if (a) {
        throw new DormouseError("plugin_duplicate", `Plugins "${a}" and "${b}" both have the command --${command}`);
      }
      owners.set(command, b);
    }
  }
  const ordered = new Set<L>();
  const visit = (each: L, path: string[]) => {
    const { name, requires = [] } = each.plugin;
    if (ordered.has(each)) return;
    if (path.includes(name)) {
      const circle = [...path.slice(path.indexOf(name)), name];
      throw new DormouseError("plugin_cycle", `Plugins require each other: ${circle.join(" -> ")}`);
    }
    for (const required of requires) {
      const provider = providers.get(required.replace(/\?$/, ""));
      if (provider) visit(provider, [...path, name]);
      else if (!required.endsWith("?")) {
        const hint = didYouMean(required, providers.keys());
        const message = `Plugin "${name}" requires "${required}", which no plugin that is turned on provides${hint}`;
        throw new DormouseError("plugin_missing", message);
      }
    }
    ordered.add(each);
  };
  for (const each of loaded) visit(each, []);
  return [...ordered];
}

/**
 * Of plugins in order, the one that has the command and those whose services it requires, in order too; no service where
 * the command does its work alone, for a host that runs may hold what they need.
 */
export function neededFor<L extends { plugin: Plugin }>(loaded: L[], command: string): L[] {
  const wanted = new Set<string>();
  return loaded.toReversed().filter(({ plugin }) => {
    const own = plugin.commands?.[command];
    const needed = own || plugin.provides?.some((service) => wanted.has(service));
    if (needed && !own?.alone) {
      for (const required of plugin.requires ?? []) wanted.add(required.replace(/\?$/, ""));
    }
    return needed;
  }).reverse();
}
