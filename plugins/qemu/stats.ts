import { readFileSync } from "node:fs";
import type { Stats } from "../../main.ts";
import { type ProcessId, processMemory, processStat } from "../shared/proc.ts";

/** What a machine uses: all of it is QEMU's one process; the network as the guest sees it. */
export function statsOf({ pid }: ProcessId, device: string | null): Stats {
  const { rss, vms } = processMemory(pid);
  return {
    cpu_seconds: processStat(pid)?.cpuSeconds ?? 0,
    memory_rss_bytes: rss,
    memory_vms_bytes: vms,
    // What the host's end of the cable sends is what the guest receives.
    network_rx_bytes: counter(device, "tx_bytes"),
    network_tx_bytes: counter(device, "rx_bytes"),
  };
}

function counter(device: string | null, name: string): number {
  if (device === null) return 0;
  try {
    return Number(readFileSync(`/sys/class/net/${device}/statistics/${name}`, "latin1"));
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return 0;
    throw error;
  }
}
