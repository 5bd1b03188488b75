import { execa } from "execa";

/** Why promtool cannot be run here, or null. */
export async function promtool(): Promise<string | null> {
  const { failed } = await execa("promtool", ["--version"], { reject: false });
  return failed ? "promtool of the Debian package prometheus is not here" : null;
}
