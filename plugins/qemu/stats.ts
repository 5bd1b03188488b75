import type { Stats } from "../../main.ts";
import { cableBytes } from "../shared/cable.ts";
import { type ProcessId, processMemory, processStat } from "../shared/proc.ts";

/** What a machine uses: all of it is QEMU's one process; the network as the guest sees it. */
export function statsOf({ pid }: ProcessId, device: string | null): Stats {
  const { rss, vms } = processMemory(pid);
  return {
    cpu_seconds: processStat(pid)?.cpuSeconds ?? 0,
    memory_rss_bytes: rss,
    memory_vms_bytes: vms,
    ...cableBytes(device),
  };
}
