import { GROUPS, type Spec } from "./table.ts";

/** All metrics as a Markdown table, for the README. */
export function metricsTable(): string {
  const rows = Object.values(GROUPS).flatMap(({ metrics }) =>
    Object.entries<Spec>(metrics).map(([name, { type, labels, help }]) =>
      `| \`${name}\` | ${type} | ${labels.map((label) => `\`${label}\``).join(", ")} | ${help} |`
    )
  );
  return ["| metric | type | labels | what |", "|---|---|---|---|", ...rows].join("\n");
}
