import { existsSync, readFileSync } from "node:fs";
import { dirname, resolve } from "node:path";
import { parse as parseToml, TomlError } from "smol-toml";
import * as v from "valibot";
import { isPromise } from "./async.ts";
import type { Schema, SchemaIssue } from "./contracts.ts";
import { DormouseError, type ErrorCode, messageOf } from "./errors.ts";
import { didYouMean } from "./nearest.ts";
import { duration } from "./schemas.ts";

const HostOptions = v.object({
  /** Events that may wait for one subscriber before it is told that it lagged. */
  event_buffer: v.optional(v.pipe(v.number(), v.integer(), v.minValue(1)), 256),
  setup_timeout: v.optional(duration({ min: 1 }), "30s"),
  close_timeout: v.optional(duration({ min: 1 }), "30s"),
  guard_timeout: v.optional(duration({ min: 1 }), "10s"),
  log_level: v.optional(v.picklist(["trace", "debug", "info", "warning", "error", "fatal"]), "info"),
  log_format: v.optional(v.picklist(["auto", "human", "json"]), "auto"),
});
export type HostOptions = v.InferOutput<typeof HostOptions>;
export const HOST_DEFAULTS: HostOptions = v.parse(HostOptions, {});

type Table = Record<string, unknown>;

/** One `[plugins.NAME]` table that is turned on. */
export interface PluginConfig {
  name: string;
  /** The module's specifier or path, absolute where it was relative; absent for those in `plugins/`. */
  use?: string;
  options: Table;
}
export interface Config {
  dataDir: string;
  host: HostOptions;
  plugins: PluginConfig[];
}

/** Collects every problem of a config, so that all are told at once. */
export class Problems {
  readonly #file: string;
  readonly lines: string[] = [];
  /** The environment variables that set a path, which are then named in the place of the file. */
  readonly variables = new Map<string, string>();
  #code: ErrorCode = "config_invalid";
  constructor(file: string) {
    this.#file = file;
  }
  add(path: string, text: string): void {
    this.lines.push(`${this.variables.get(path) ?? this.#file}: ${path}: ${text}`);
  }
  /** Adds the error of a plugin that did not load; its code stays, where it is the only problem. */
  include(plugin: string, error: unknown): void {
    if (!(error instanceof DormouseError)) throw error;
    this.#code = this.lines.length === 0 ? error.code : "config_invalid";
    this.add(`plugins.${plugin}`, error.message);
  }
  /** @throws {DormouseError} with a line for each problem */
  throwIfAny(): void {
    const code = this.lines.length === 1 ? this.#code : "config_invalid";
    if (this.lines.length > 0) throw new DormouseError(code, this.lines.join("\n"));
  }
}

/**
 * Reads a TOML file, lays the `DORMOUSE_*` variables of `env` over it and checks all but the plugins' own options, which
 * the host checks once it has loaded them.
 *
 * @throws {DormouseError} `config_invalid` where the file cannot be read or is not TOML
 */
export function readConfig(file: string, options: { env: Record<string, string | undefined>; dataDir: string }): {
  config: Config;
  problems: Problems;
} {
  const problems = new Problems(file);
  const root = parse(file);
  overlay(root, options.env, problems);
  for (const key of Object.keys(root)) {
    const known = ["data_dir", "host", "plugins"];
    if (!known.includes(key)) problems.add(key, `unknown key${didYouMean(key, known)}`);
  }
  if (root.data_dir !== undefined && typeof root.data_dir !== "string") {
    problems.add("data_dir", `expected a path, found ${show(root.data_dir)}`);
  }
  const host = check(HostOptions, root.host ?? {}, "host", problems) ?? HOST_DEFAULTS;
  const dataDir = typeof root.data_dir === "string" ? resolve(dirname(file), root.data_dir) : options.dataDir;
  return { config: { dataDir, host, plugins: pluginTables(root.plugins ?? {}, dirname(file), problems) }, problems };
}

/** The schema's output, or undefined after its issues and the table's unknown keys are added to `problems`. */
export function check<T>(schema: Schema<T>, value: unknown, path: string, problems: Problems): T | undefined {
  const before = problems.lines.length;
  unknownKeys(schema, value, path, problems);
  const result = schema["~standard"].validate(value);
  if (isPromise(result)) return void problems.add(path, "its schema is asynchronous");
  for (const issue of result.issues ?? []) {
    if ((issue as { expected?: string }).expected === "never") continue; // an unknown key of a strict object
    const keys = (issue.path ?? []).map((part) => String(typeof part === "object" ? part.key : part));
    problems.add([path, ...keys].join("."), describe(issue, keys.reduce(member, schema)));
  }
  return problems.lines.length === before && !result.issues ? result.value : undefined;
}

/** A value much as it reads in TOML, cut short. */
export function show(value: unknown): string {
  const text = typeof value === "number" ? String(value) : JSON.stringify(value) ?? String(value);
  return text.length > 60 ? `${text.slice(0, 57)}...` : text;
}

// Valibot says what it expected and found; of other libraries only the message is known.
function describe(issue: SchemaIssue & { expected?: string | null; input?: unknown; kind?: string }, at: unknown) {
  if (issue.kind === undefined) return issue.message;
  if (issue.input === undefined) {
    const { message, expects } = (at ?? {}) as { message?: unknown; expects?: string };
    return `missing, ${typeof message === "string" ? message : `expected ${expects ?? "a value"}`}`;
  }
  const [own] = issue.message.split(/: (?:Expected|Received) /, 1); // its default messages repeat what is said here
  const wanted = own !== issue.message && issue.expected ? `expected ${issue.expected}` : own;
  return `${wanted}, found ${show(issue.input)}`;
}

function member(schema: unknown, key: string): unknown {
  const { entries, wrapped, item, value } = (schema ?? {}) as Record<string, unknown> & { entries?: Table };
  return wrapped ? member(wrapped, key) : entries?.[key] ?? item ?? value;
}

// Valibot's objects carry their `entries` and its wrappers what they wrap; elsewhere the library's own issues must do.
function unknownKeys(schema: unknown, value: unknown, path: string, problems: Problems): void {
  const { type, entries, wrapped, item, value: each } = schema as Record<string, unknown> & { entries?: Table };
  if (wrapped) return unknownKeys(wrapped, value, path, problems);
  if (item && Array.isArray(value)) value.forEach((inner, i) => unknownKeys(item, inner, `${path}.${i}`, problems));
  if (!isTable(value)) return;
  if (type === "record") {
    for (const [key, inner] of Object.entries(value)) unknownKeys(each, inner, `${path}.${key}`, problems);
  }
  if (!entries) return;
  for (const [key, inner] of Object.entries(value)) {
    if (Object.hasOwn(entries, key)) unknownKeys(entries[key], inner, `${path}.${key}`, problems);
    else problems.add(`${path}.${key}`, `unknown key${didYouMean(key, Object.keys(entries))}`);
  }
}

function parse(file: string): Table {
  let text: string;
  try {
    text = readFileSync(file, "utf8");
  } catch (error) {
    throw new DormouseError("config_invalid", `${file}: cannot be read: ${messageOf(error)}`, { cause: error });
  }
  try {
    return parseToml(text) as Table;
  } catch (error) {
    if (!(error instanceof TomlError)) throw error;
    const reason = error.message.split("\n")[0].replace(/^Invalid TOML document: /, "");
    const message = `${file}:${error.line}:${error.column}: ${reason}\n\n${error.codeblock}`;
    throw new DormouseError("config_invalid", message, { cause: error });
  }
}

/** `DORMOUSE_PLUGINS__API__LISTEN=...` sets `plugins.api.listen`; the value is TOML, or else text. */
function overlay(root: Table, env: Record<string, string | undefined>, problems: Problems): void {
  for (const [variable, text] of Object.entries(env)) {
    if (text === undefined || !/^DORMOUSE_(DATA_DIR$|.*__)/.test(variable)) continue;
    const keys = variable.slice("DORMOUSE_".length).toLowerCase().split("__");
    if (!["data_dir", "host", "plugins"].includes(keys[0])) {
      problems.add(variable, "expected DORMOUSE_DATA_DIR, DORMOUSE_HOST__KEY or DORMOUSE_PLUGINS__NAME__KEY");
      continue;
    }
    if (keys[0] === "plugins" && keys[1]) keys[1] = keys[1].replaceAll("_", "-");
    if (keys.includes("")) {
      problems.add(variable, "has an empty key");
      continue;
    }
    problems.variables.set(keys.join("."), variable);
    let table = root;
    for (const key of keys.slice(0, -1)) table = (isTable(table[key]) ? table[key] : (table[key] = {})) as Table;
    table[keys.at(-1)!] = keys[0] === "data_dir" ? resolve(text) : tomlValue(text);
  }
}

function tomlValue(text: string): unknown {
  try {
    return parseToml(`value = ${text}`).value;
  } catch (error) {
    if (error instanceof TomlError) return text;
    throw error;
  }
}

function pluginTables(tables: unknown, folder: string, problems: Problems): PluginConfig[] {
  if (!isTable(tables)) {
    problems.add("plugins", `expected tables [plugins.NAME], found ${show(tables)}`);
    return [];
  }
  const plugins: PluginConfig[] = [];
  for (const [name, table] of Object.entries(tables)) {
    if (!/^[a-z][\w-]*$/i.test(name)) {
      problems.add(
        `plugins.${JSON.stringify(name)}`,
        "expected a name that begins with a letter, of letters, digits, _ and -",
      );
      continue;
    }
    if (!isTable(table)) {
      problems.add(`plugins.${name}`, `expected a table, found ${show(table)}`);
      continue;
    }
    const { enabled = true, use, ...options } = table;
    if (typeof enabled !== "boolean") {
      problems.add(`plugins.${name}.enabled`, `expected true or false, found ${show(enabled)}`);
    }
    if (use !== undefined && typeof use !== "string") {
      problems.add(`plugins.${name}.use`, `expected a path or a package, found ${show(use)}`);
    }
    if (enabled !== true) continue;
    const local = typeof use === "string" && /^\.{0,2}\//.test(use);
    plugins.push({ name, options, ...(typeof use === "string" && { use: local ? resolve(folder, use) : use }) });
  }
  return plugins;
}

function isTable(value: unknown): value is Table {
  return typeof value === "object" && value !== null && !Array.isArray(value) && !(value instanceof Date);
}

/** The file of a plugin of this project, `NAME.ts` or `NAME/mod.ts` below `folder`; undefined where there is neither. */
export function pluginFile(folder: string, name: string): string | undefined {
  return [`${name}.ts`, `${name}/mod.ts`].map((path) => resolve(folder, path)).find((path) => existsSync(path));
}
