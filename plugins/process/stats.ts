import { readFileSync } from "node:fs";
import type { Stats } from "../../main.ts";
import { Cgroup } from "../shared/cgroup.ts";
import { processMemory, processStat } from "../shared/proc.ts";
import type { Enclosure } from "./enclosure.ts";

/**
 * What an instance uses. Memory is summed over its processes, so that what they share counts for each of them; the
 * network is seen from inside, and zero where it has no interface of its own.
 */
export function statsOf(enclosure: Enclosure, device: string | null): Stats {
  const members = enclosure.members();
  const memory = members.map(processMemory);
  const counted = enclosure instanceof Cgroup ? enclosure.cpuSeconds() : undefined;
  return {
    cpu_seconds: counted ?? sum(members.map((pid) => processStat(pid)?.cpuSeconds ?? 0)),
    memory_rss_bytes: sum(memory.map(({ rss }) => rss)),
    memory_vms_bytes: sum(memory.map(({ vms }) => vms)),
    // What the host's end of the cable sends is what the instance receives.
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

function sum(numbers: number[]): number {
  return numbers.reduce((total, number) => total + number, 0);
}
