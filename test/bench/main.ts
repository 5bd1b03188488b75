/** Runs every benchmark of this folder, or those that are named, each in a process of its own: `deno task bench bus`. */
import { readdirSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { execa } from "execa";
import { RUNTIME } from "../helpers.ts";

const FOLDER = import.meta.dirname!;
const all = readdirSync(FOLDER).filter((file) => file.endsWith(".ts") && file !== "main.ts")
  .map((file) => file.slice(0, -".ts".length)).sort();
const named = process.argv.slice(2);
const unknown = named.find((name) => !all.includes(name));
if (unknown !== undefined) {
  console.error(`Cannot run benchmark "${unknown}": there are ${all.join(", ")}`);
  process.exit(2);
}
const [command, ...flags] = RUNTIME;
for (const name of named.length > 0 ? named : all) {
  const { exitCode } = await execa(command, [...flags, join(FOLDER, `${name}.ts`)], {
    stdio: "inherit",
    reject: false,
  });
  // A benchmark that fails must not hide the numbers of those after it.
  if (exitCode !== 0) process.exitCode = 1;
}
