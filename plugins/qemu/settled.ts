import { delay } from "../shared/async.ts";
import type { Qmp } from "./qmp.ts";
import type { Records } from "./records.ts";
import { cancelSave, dropState } from "./snapshot.ts";

/** Milliseconds in which a write fails again that has failed before. */
const RETRIED_MS = 100;

/**
 * What a machine is whose QEMU says that it is `status`, after what a host left half done was finished or undone; `over`
 * where nothing of that QEMU is needed any more.
 *
 * @throws where that cannot be told
 */
export async function settled(
  qmp: Qmp,
  records: Records,
  status: string,
): Promise<"Initializing" | "Running" | "Paused" | "over"> {
  const ready = records.isMarked("ready") ? "Running" : "Initializing";
  if (status === "running") {
    // It ran on since: a state of before is of no more use, nor is a mark that it stands still.
    if (records.has("state")) await records.spend();
    records.unmark("paused");
    return ready;
  }
  if (records.has("state") || status === "inmigrate") return "over";
  if (status === "io-error") {
    // Its disk could not be written, which the guest does not see. Each look is an attempt, for room may have been made.
    records.mark("stale");
    await qmp.execute("cont");
    await delay(RETRIED_MS);
    const { status: now } = await qmp.execute("query-status") as { status: string };
    if (now === "running") return ready;
    throw new Error("its disk cannot be written; it goes on once there is room");
  }
  if (status === "internal-error") {
    records.end({ exit_code: null, exit_message: "QEMU could not go on with the guest" });
    return "over";
  }
  if (!["paused", "postmigrate", "finish-migrate", "prelaunch"].includes(status)) {
    throw new Error(`QEMU says "${status}"`);
  }
  if (records.isMarked("paused")) return "Paused";
  records.mark("stale");
  await cancelSave(qmp);
  dropState(records);
  return ready;
}
