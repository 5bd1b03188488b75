import { parseArgs } from "node:util";
import { DormouseError } from "./errors.ts";
import { didYouMean } from "./nearest.ts";

/** What is the host's own, and so no plugin's command. */
export const FLAGS = { config: "string", check: "boolean", help: "boolean", version: "boolean" } as const;

export interface Arguments {
  /** Of `--config`, as given. */
  file: string | undefined;
  check: boolean;
  help: boolean;
  version: boolean;
  /** The one other flag, which some plugin must know: `--COMMAND`. */
  command: string | undefined;
}

/**
 * The program's arguments. Whether a plugin has the command is known only once the config is read.
 *
 * @throws {DormouseError} `invalid_request` with the first argument that cannot be used
 */
export function readArguments(argv: string[]): Arguments {
  const options = Object.fromEntries(Object.entries(FLAGS).map(([flag, type]) => [flag, { type }]));
  const { values, positionals } = parseArgs({ args: argv, options, strict: false, allowPositionals: true });
  const { config, check, help, version, ...commands } = values;
  if (config === true || config === "") throw unusable("--config", ": it needs a file");
  for (const [flag, value] of Object.entries(values)) {
    if (flag !== "config" && value !== true) throw unusable(`--${flag}=${value}`, ": it takes no value");
  }
  if (positionals.length > 0) {
    throw unusable(
      positionals[0],
      didYouMean(positionals[0], Object.keys(FLAGS).map((flag) => `--${flag}`)),
    );
  }
  const [command, second] = Object.keys(commands);
  if (second !== undefined) throw unusable(`--${second}`, `: there is --${command} already`);
  const file = config as string | undefined;
  return { file, check: check === true, help: help === true, version: version === true, command };
}

/** @throws {DormouseError} `invalid_request` where the command is not one of `commands` */
export function refuseUnknown(command: string | undefined, commands: string[]): void {
  if (command === undefined || commands.includes(command)) return;
  const known = [...Object.keys(FLAGS), ...commands].map((name) => `--${name}`);
  throw unusable(`--${command}`, didYouMean(`--${command}`, known));
}

/** The text of `--help` that holds without a config. */
export function usage(version: string): string {
  return `Dormouse ${version}: runs instances, puts the idle ones to sleep and wakes them on traffic.

  deno run -A main.ts [--config FILE] [--check | --COMMAND]

  --config FILE   the config; config/config.toml beside main.ts when absent
  --check         check the config and every plugin's options, then exit
  --help          this text
  --version       the version
`;
}

/** The rest of it: the commands of the plugins that the config turns on. */
export function commandHelp(commands: Record<string, { help: string }>): string {
  const lines = Object.entries(commands).map(([name, { help }]) => `  --${name.padEnd(14)}${help}`);
  return lines.length === 0 ? "" : ["Run instead of the host, by plugins of this config:", "", ...lines].join("\n");
}

function unusable(argument: string, why: string): DormouseError {
  return new DormouseError("invalid_request", `Cannot use argument "${argument}"${why}, see --help`);
}
