/** What of README.md is made from the code. `deno task docs` writes it; `readme.test.ts` proves that it is current. */
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { metricsTable } from "../plugins/metrics/docs.ts";
import { ERRORS } from "../plugins/shared/errors.ts";
import { ROOT } from "./helpers.ts";

export const README = join(ROOT, "README.md");

/** The table of all error codes, in the order of the code. */
export function errorsTable(): string {
  const rows = Object.entries(ERRORS).map(([code, { status, summary }]) =>
    `| \`${code}\` | ${status ?? ""} | ${summary} |`
  );
  return ["| code | status | when |", "|---|---|---|", ...rows].join("\n");
}

/** The README with what is made from the code made anew. */
export function current(text: string): string {
  const tables = { errors: errorsTable(), metrics: metricsTable() };
  return Object.entries(tables).reduce((made, [name, table]) =>
    made.replace(
      new RegExp(`(<!-- ${name}:begin -->\\n)[^]*(<!-- ${name}:end -->)`),
      (_, begin, end) => `${begin}${table}\n${end}`,
    ), text);
}

/** The code block behind a `<!-- test:NAME -->` comment. */
export function block(name: string): string {
  const match = new RegExp(`<!-- test:${name} -->\\n\`\`\`\\w+\\n([^]*?)\\n\`\`\``).exec(readFileSync(README, "utf8"));
  if (!match) throw new Error(`README.md has no block "${name}"`);
  return match[1];
}

if (import.meta.main) writeFileSync(README, current(readFileSync(README, "utf8")));
