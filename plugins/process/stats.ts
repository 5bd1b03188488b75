import type { Stats } from "../../main.ts";
import { cableBytes } from "../shared/cable.ts";
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
    ...cableBytes(device),
  };
}

function sum(numbers: number[]): number {
  return numbers.reduce((total, number) => total + number, 0);
}
