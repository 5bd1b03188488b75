import { readdirSync } from "node:fs";
import { isAbsolute } from "node:path";
import { pathToFileURL } from "node:url";
import type { Plugin } from "../../main.ts";
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
    throw new DormouseError("plugin_unknown", `No plugin "${name}" in ${folder}${didYouMean(name, names)}`);
  }
  let module: { default?: unknown };
  try {
    module = await import(isAbsolute(specifier) ? pathToFileURL(specifier).href : specifier);
  } catch (error) {
    const message = `Cannot load plugin "${name}" from ${specifier}: ${messageOf(error)}`;
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
    if (plugin[list] !== undefined && !Array.isArray(plugin[list])) throw wrong(`${list} is not a list`);
  }
  return { ...plugin, name } as Plugin;
}

/**
 * The plugins so that each comes after those whose services it requires, and else as they were given.
 *
 * @throws {DormouseError} `plugin_missing`, `plugin_cycle`, `plugin_duplicate`
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
  const ordered = new Set<L>();
  const visit = (each: L, path: string[]) => {
    const { name, requires = [] } = each.plugin;
    if (ordered.has(each)) return;
    if (path.includes(name)) {
      throw new DormouseError("plugin_cycle", `Plugins require each other: ${[...path, name].join(" -> ")}`);
    }
    for (const required of requires) {
      const provider = providers.get(required.replace(/\?$/, ""));
      if (provider && provider !== each) visit(provider, [...path, name]);
      else if (!provider && !required.endsWith("?")) {
        throw new DormouseError(
          "plugin_missing",
          `Plugin "${name}" requires "${required}", which no plugin that is turned on provides`,
        );
      }
    }
    ordered.add(each);
  };
  for (const each of loaded) visit(each, []);
  return [...ordered];
}

/** Of plugins in order, the one that has the command and those whose services it requires, in order too. */
export function neededFor<L extends { plugin: Plugin }>(loaded: L[], command: string): L[] {
  const wanted = new Set<string>();
  return loaded.toReversed().filter(({ plugin }) => {
    const needed = plugin.commands?.[command] || plugin.provides?.some((service) => wanted.has(service));
    if (needed) { for (const required of plugin.requires ?? []) wanted.add(required.replace(/\?$/, "")); }
    return needed;
  }).reverse();
}
