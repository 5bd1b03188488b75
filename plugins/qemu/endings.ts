import { bootId } from "../shared/proc.ts";
import { lastLine } from "./launch.ts";
import type { QmpEvent } from "./qmp.ts";
import type { Exit, Launch, Records } from "./records.ts";

/** Why QEMU ended by itself, by the reason of its SHUTDOWN event. */
const ENDINGS: Record<string, string> = {
  "guest-shutdown": "the guest powered off",
  "guest-reset": "the guest restarted, which ends it",
  "guest-panic": "the guest's kernel panicked",
  "host-qmp-quit": "it was powered off",
  "host-signal": "QEMU was ended by a signal",
  "host-error": "QEMU met an error",
};

/** Writes down how a machine ended, where the event tells of that. @throws where it cannot be written */
export function keepEnding(records: Records, { event, data }: QmpEvent): void {
  if (event !== "SHUTDOWN") return;
  const exit_code = records.exitCode();
  const { reason } = data;
  const known = typeof reason === "string" && Object.hasOwn(ENDINGS, reason);
  records.end({ exit_code, exit_message: exit_code === null ? known ? ENDINGS[reason] : "QEMU ended" : null });
}

/** How a machine ended, by what there is to know of it. */
export function exitOf(records: Records, { boot }: Launch): Exit {
  const exit_code = records.exitCode();
  if (exit_code !== null) return { exit_code, exit_message: null };
  const told = records.ended();
  if (told) return told;
  const why = boot === bootId() ? `QEMU ended: ${lastLine(records.qemuLog)}` : "the machine was restarted";
  return { exit_code, exit_message: why };
}
