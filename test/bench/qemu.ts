/**
 * Machines of the driver `qemu` under tcg. Standby and restore of guests of 256 MiB, 1 GiB and 2 GiB with more than half of
 * it in use, against QEMU's own full copy of the same guest: `migrate exec:cat` of all of its memory to a file and back,
 * into a QEMU whose memory is in no file. What either writes is in the page cache when it counts as done, and not on disk.
 *
 * Restore to `Running`, where the guest's agent has set its clock, against a bare start of the same QEMU: the same command
 * line, from the exec to the first `query-status` that is "running", when no kernel has booted yet. Budget: 1.5x of it.
 *
 * Ten forks of one sleeping machine: the time to `Running` against a boot; and the memory that they take (PSS: what several
 * processes share is divided among them) against ten times that of their source when it was awake.
 */
import { mkdtempSync, rmSync } from "node:fs";
import { availableParallelism, loadavg, tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import type { TestContext } from "node:test";
import { Images } from "../../plugins/qemu/images.ts";
import { QemuFixture } from "../qemu/fixture.ts";
import { demoImage, skipGuest } from "../qemu/guest.ts";
import { type Cycle, Machine, timed } from "../qemu/measured.ts";

const SIZES = [256, 1024, 2048];
const [CYCLES, COPIES, STARTS, FORKS, AT_A_TIME] = [6, 2, 15, 10, 4];
const BUDGET = 1.5;
const LONGEST_MS = 480_000;

const interrupted = new AbortController();
const signal = AbortSignal.any([interrupted.signal, AbortSignal.timeout(LONGEST_MS)]);

/** The value below which so much of them is. */
function quantile(found: readonly number[], share: number): number {
  return found.toSorted((a, b) => a - b)[Math.min(Math.floor(found.length * share), found.length - 1)];
}
const median = (found: readonly number[]) => quantile(found, 0.5);
const middle = (cycles: readonly Cycle[], what: keyof Cycle) => median(cycles.map((cycle) => cycle[what]));
const ms = (value: number) => `${value.toFixed(0)} ms`;
const mb = (bytes: number) => `${(bytes / 1e6).toFixed(bytes < 1e7 ? 2 : 0)} MB`;
const times = (value: number, base: number) => `${(value / base).toFixed(2)}x`;
const say = (text: string) => console.log(`qemu: ${text}`);

interface Figures {
  standby: number;
  cont: number;
  running: number;
  copyStandby: number;
  copyCont: number;
}

/** Standby and restore against the full copy; the machine is awake before and after. */
async function sizes(machine: Machine): Promise<Figures> {
  // With the memory that has just been written to still on its way to disk.
  const first = await machine.cycle();
  const [cycles, copies]: [Cycle[], Awaited<ReturnType<Machine["copy"]>>[]] = [[], []];
  let bytes = 0;
  for (let round = 0; round < COPIES; round++) {
    for (let i = 0; i < CYCLES / COPIES; i++) cycles.push(await machine.cycle());
    await machine.cycle(async () => {
      bytes = machine.stateBytes();
      copies.push(await machine.copy());
    });
  }
  const [standby, cont, running] = [
    middle(cycles, "standby"),
    middle(cycles, "cont"),
    middle(cycles, "running"),
  ];
  // Other work on this machine only ever takes away: the best of what is compared with.
  const copyStandby = Math.min(...copies.map((copy) => copy.standby));
  const copyCont = Math.min(...copies.map((copy) => copy.cont));
  const title = `${machine.mib} MiB`.padStart(8);
  say(`${title}: standby ${ms(standby)}, restore ${ms(cont)} to cont, ${ms(running)} to Running; state ${mb(bytes)}`);
  const ratios = `${times(standby, copyStandby)} and ${times(cont, copyCont)} of that`;
  say(
    `${title}  full copy: standby ${ms(copyStandby)}, restore ${ms(copyCont)} to cont; state ${mb(copies[0].bytes)}; ` +
      `ours takes ${ratios}`,
  );
  say(`${title}  memory just written: standby ${ms(first.standby)}, restore at once ${ms(first.running)} to Running`);
  return { standby, cont, running, copyStandby, copyCont };
}

/** Restores against bare starts, by turns. */
async function starts(machine: Machine): Promise<void> {
  const [cycles, bare]: [Cycle[], number[]] = [[], []];
  for (let round = 0; round < STARTS; round++) {
    cycles.push(await machine.cycle(async () => void bare.push(await machine.bare())));
  }
  const show = (found: readonly number[]) => `${ms(median(found))} (p90 ${ms(quantile(found, 0.9))})`;
  const [monitor, cont, running] = (["monitor", "cont", "running"] as const).map((what) =>
    cycles.map((cycle) => cycle[what])
  );
  say(`bare start of QEMU, ${STARTS} rounds by turns with restores: ${show(bare)}`);
  say(`restore: QEMU answers after ${show(monitor)}, the guest goes on after ${show(cont)}, Running ${show(running)}`);
  const ratio = median(running) / median(bare);
  say(`restore to cont ${times(median(cont), median(bare))}, to Running ${ratio.toFixed(2)}x the bare start`);
  say(`budget (restore to Running at most ${BUDGET}x the bare start): ${ratio <= BUDGET ? "met" : "MISSED"}`);
}

/** Forks of a machine, which is awake before and asleep after. */
async function forks(source: Machine, awake: number): Promise<void> {
  await source.standby();
  const all = Array.from({ length: FORKS }, () => source.sibling());
  const [made, woken]: [number[], number[]] = [[], []];
  const whole = await timed(signal, async () => {
    for (const fork of all) {
      made.push(await timed(signal, () => source.fork(fork)));
      woken.push(await timed(signal, () => fork.restore()));
    }
  });
  const memory = all.map((fork) => fork.pss());
  for (const fork of all) await fork.remove();

  const others = Array.from({ length: FORKS }, () => source.sibling());
  for (const fork of others) await source.fork(fork);
  const together: number[] = [];
  const last = await timed(signal, async () => {
    const waking = others.map(async (fork) => void together.push(await timed(signal, () => fork.restore())));
    for (const each of await Promise.allSettled(waking)) if (each.status === "rejected") throw each.reason;
  });
  for (const fork of others) await fork.remove();

  const one = median(made) + median(woken);
  say(
    `${FORKS} forks of a sleeping machine, one after the other: made in ${ms(median(made))}, Running ` +
      `${ms(median(woken))} later (at most ${ms(Math.max(...woken))}), all in ${ms(whole)}; ` +
      `one takes ${times(one, source.boot)} a boot (${ms(source.boot)})`,
  );
  say(`${FORKS} restored at once, ${AT_A_TIME} at a time: p50 ${ms(median(together))}, all in ${ms(last)}`);
  const sum = (what: "all" | "own") => memory.reduce((total, pss) => total + pss[what], 0);
  say(
    `memory of ${FORKS} forks: PSS ${mb(sum("all"))}, ${mb(sum("all") / FORKS)} each, ${
      mb(sum("own") / FORKS)
    } of it ` +
      `shared with nobody; ${times(sum("all"), awake * FORKS)} of ${FORKS} times the source awake (${mb(awake)})`,
  );
}

export async function main(): Promise<void> {
  if (skipGuest) return say(`passed over: ${skipGuest}`);
  await using stack = new AsyncDisposableStack();
  // What tests clean up after themselves.
  const t = { after: (end: () => Promise<void>) => stack.defer(end) } as unknown as TestContext;
  const folder = mkdtempSync(join(tmpdir(), "dormouse-bench-"));
  stack.defer(() => rmSync(folder, { recursive: true, force: true }));
  const image = await demoImage();
  say(`${availableParallelism()} CPUs, with a load average of ${loadavg()[0].toFixed(1)} before this`);
  const fixture = new QemuFixture(t, "qemu-microvm", image, { max_concurrent_restores: AT_A_TIME });
  const context = { fixture, driver: fixture.open(), image: new Images("").read(image), folder, signal };
  const found: Figures[] = [];
  for (const mib of SIZES) {
    const machine = new Machine(context, mib);
    await machine.begin();
    const awake = machine.pss().all;
    found.push(await sizes(machine));
    if (mib === SIZES[0]) {
      await starts(machine);
      await forks(machine, awake);
    }
    await machine.remove();
    const left = machine.remains();
    if (left.length > 0) throw new Error(`it was removed, and there is still ${left.join(" and ")}`);
  }
  const [small, large] = [found[0], found.at(-1)!];
  const grown = (what: keyof Figures) => times(large[what], small[what]);
  say(
    `${SIZES.at(-1)} MiB against ${SIZES[0]} MiB: standby ${grown("standby")}, restore ${grown("cont")} to cont and ` +
      `${grown("running")} to Running; full copy ${grown("copyStandby")} and ${grown("copyCont")}`,
  );
}

if (import.meta.main) {
  // Machines outlive whoever started them.
  for (const name of ["SIGINT", "SIGTERM"] as const) {
    process.once(name, () => interrupted.abort(new Error(`ended by ${name}`)));
  }
  try {
    await main();
    process.exit(0);
  } catch (error) {
    if (!interrupted.signal.aborted) throw error;
    console.error(interrupted.signal.reason.message);
    process.exit(1);
  }
}
