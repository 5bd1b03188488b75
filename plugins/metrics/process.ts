import { existsSync, readdirSync, readFileSync } from "node:fs";
import process from "node:process";
import { processMemory } from "../shared/proc.ts";
import type { Meters } from "./meters.ts";

const FDS = "/proc/self/fd";
const LIMITS = "/proc/self/limits";
const STARTED = Date.now() / 1_000 - process.uptime();

/** The runtime that this is, and its version. */
export function runtime(): { runtime: string; runtime_version: string } {
  const { deno, node } = process.versions as Record<string, string>;
  return deno ? { runtime: "deno", runtime_version: deno } : { runtime: "node", runtime_version: node };
}

/**
 * Measures this process, the same on both runtimes. Not by prom-client's `collectDefaultMetrics`: on Deno its event-loop lag
 * and its garbage collections are missing or wrong, and its `process_heap_bytes` is address space.
 */
export function measureProcess(meters: Meters): void {
  const { user, system } = process.cpuUsage();
  const { rss, heapUsed, heapTotal, external } = process.memoryUsage();
  meters.put("process_cpu_seconds_total", (user + system) / 1e6);
  meters.put("process_resident_memory_bytes", rss);
  meters.put("process_start_time_seconds", STARTED);
  meters.put("dormouse_heap_used_bytes", heapUsed);
  meters.put("dormouse_heap_size_bytes", heapTotal);
  meters.put("dormouse_external_memory_bytes", external);
  const linux = existsSync(FDS);
  meters.put("process_virtual_memory_bytes", linux ? processMemory(process.pid).vms : null);
  // One of them is the listing's own.
  meters.put("process_open_fds", linux ? readdirSync(FDS).length - 1 : null);
  meters.put("process_max_fds", linux ? maxFds() : null);
}

function maxFds(): number | null {
  const [, soft] = /^Max open files +(\d+)/m.exec(readFileSync(LIMITS, "latin1")) ?? [];
  return soft === undefined ? null : Number(soft); // "unlimited" is no number
}
