/** Runs every benchmark of this folder, or those that are named: `deno task bench bus`. */
import { readdirSync } from "node:fs";
import process from "node:process";

const all = readdirSync(import.meta.dirname!)
  .filter((file) => file.endsWith(".ts") && file !== "main.ts" && file !== "measure.ts")
  .map((file) => file.slice(0, -".ts".length)).sort();
const named = process.argv.slice(2);
const unknown = named.find((name) => !all.includes(name));
if (unknown !== undefined) {
  console.error(`Cannot run benchmark "${unknown}": there are ${all.join(", ")}`);
  process.exit(2);
}
for (const name of named.length > 0 ? named : all) {
  const bench: { main(): Promise<void> } = await import(`./${name}.ts`);
  await bench.main();
}
