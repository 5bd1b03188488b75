import { rmSync, statSync } from "node:fs";
import type { Instance } from "../../main.ts";
import { delay } from "../shared/async.ts";
import { bootId } from "../shared/proc.ts";
import { formatSize } from "../shared/size.ts";
import { keepCompressed } from "./compress.ts";
import type { Fleet } from "./fleet.ts";
import type { Records, Snapshot } from "./records.ts";
import { syncMemory } from "./snapshot.ts";
import type { CompressionPlan } from "./snapshot-policy.ts";

/** Milliseconds between two looks at whether forks still have the memory; no file system tells of that. */
const LOOK_MS = 30_000;
/** What a timer can wait for, and how soon a clock that was set is noticed. */
const LONGEST_MS = 3_600_000;

/**
 * Does behind the scenes what there is to do with the memory of a machine that sleeps: it is brought to disk, and
 * compressed if its snapshot has a plan for that. Whatever else begins with the machine ends this; called again, it goes
 * on where it was.
 */
export function putAway(fleet: Fleet, { id, name }: Pick<Instance, "id" | "name">): void {
  const { records } = fleet.vm(id);
  if (!records.snapshot()) return;
  fleet.watch(id, async (signal) => {
    const turn = <T>(work: (records: Records) => T | Promise<T>): Promise<T> => {
      signal.throwIfAborted();
      return fleet.turn(id, async () => {
        signal.throwIfAborted();
        return await work(records);
      });
    };
    const snapshot = await turn(() => {
      records.tidy();
      const found = records.snapshot();
      if (found?.compressed) records.empty(fleet.context.owner);
      return found;
    });
    if (!snapshot || snapshot.compressed) return;
    if (!snapshot.durable) {
      if (snapshot.boot !== bootId()) return; // what it held was lost with a start of before
      await syncMemory(records);
      await turn(() => records.amend({ durable: true }));
    }
    // A fork that sleeps with a view of another's memory has none of its own.
    if (!snapshot.plan || snapshot.full || records.isForked()) return;
    await compress(fleet, { id, name }, { snapshot, plan: snapshot.plan, signal, turn });
  });
}

interface Compressing {
  snapshot: Snapshot;
  plan: CompressionPlan;
  signal: AbortSignal;
  turn<T>(work: (records: Records) => T | Promise<T>): Promise<T>;
}

async function compress(
  fleet: Fleet,
  { id, name }: Pick<Instance, "id" | "name">,
  { snapshot, plan, signal, turn }: Compressing,
): Promise<void> {
  const { log, owner } = fleet.context;
  const { records } = fleet.vm(id);
  await until(snapshot.at, plan.delay, signal);
  while (await turn(() => records.isShared())) await delay(LOOK_MS, { signal });
  const copy = await fleet.compressor.copy(id, records, plan, signal);
  try {
    const [before, after] = [bytesOf(records.ram), bytesOf(copy)];
    if (after >= before) return log.debug("The memory of {name} does not become smaller", { name });
    await turn(async () => {
      if (records.snapshot()?.id !== snapshot.id || records.isShared()) return;
      await keepCompressed(records, copy, owner);
      const sizes = { name, before: formatSize(before), after: formatSize(after) };
      log.info("Compressed the memory of {name} from {before} to {after}", sizes);
    });
  } finally {
    rmSync(copy, { force: true });
  }
}

/** Resolves `ms` after a time of the wall clock, the only one that goes on while this host is not there. */
async function until(at: number, ms: number, signal: AbortSignal): Promise<void> {
  for (;;) {
    const left = Math.min(at + ms - Date.now(), ms, LONGEST_MS);
    if (!(left > 0)) return;
    await delay(left, { signal });
  }
}

/** What a file takes of the disk. */
function bytesOf(path: string): number {
  return statSync(path).blocks * 512;
}
