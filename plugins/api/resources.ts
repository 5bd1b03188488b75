import { readdir, readFile, statfs } from "node:fs/promises";
import { availableParallelism, totalmem } from "node:os";
import { join } from "node:path";
import type { Instance, State } from "../../main.ts";
import type { Resource, ResourcesAnswer } from "./host-schemas.ts";

/** Which states hold what an instance was given: a sleeping one gives it back. */
const HOLDS = {
  Created: true,
  Initializing: true,
  Running: true,
  Paused: true,
  Shutdown: true,
  Unknown: true,
  Stopped: false,
  Standby: false,
} satisfies Record<State, boolean>;

/** What the machine has and what instances were given of it. Nothing is promised twice, so the ratio is always 1. */
export async function resourcesOf(instances: readonly Instance[], dataDir: string): Promise<ResourcesAnswer> {
  const allocations = instances.filter(({ state }) => HOLDS[state]).map(({ id, name, vcpus, memory_bytes }) => ({
    instance_id: id,
    instance_name: name,
    cpu: vcpus ?? 0,
    memory_bytes: memory_bytes ?? 0,
  }));
  const sum = (of: "cpu" | "memory_bytes") => allocations.reduce((total, allocation) => total + allocation[of], 0);
  const { blocks, bavail, bsize } = await statfs(dataDir);
  return {
    cpu: resource("cpu", availableParallelism(), sum("cpu")),
    memory: resource("memory", totalmem(), sum("memory_bytes")),
    // Disks are not reserved; what is used of the file system is what others cannot have.
    disk: resource("disk", blocks * bsize, (blocks - bavail) * bsize),
    network: resource("network", await networkSpeed(), 0),
    allocations,
  };
}

function resource(type: string, capacity: number, allocated: number): Resource {
  const available = Math.max(0, capacity - allocated);
  return { type, capacity, effective_limit: capacity, allocated, available, oversub_ratio: 1, source: "detected" };
}

/**
 * Bytes a second of the fastest network device that has hardware behind it; 0 where none says (virtual machines).
 * https://www.kernel.org/doc/Documentation/ABI/testing/sysfs-class-net
 */
async function networkSpeed(folder = "/sys/class/net"): Promise<number> {
  const devices = await readdir(folder).catch(() => []); // not Linux
  const speeds = await Promise.all(devices.map(async (device) => {
    // Reading fails for a device that is down, and a virtual one has no `device`.
    const speed = await readdir(join(folder, device, "device")).then(
      () => readFile(join(folder, device, "speed"), "utf8"),
    ).catch(() => "0");
    return Number(speed);
  }));
  const megabits = Math.max(0, ...speeds);
  return megabits * 1e6 / 8;
}
