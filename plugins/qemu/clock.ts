import { existsSync, readFileSync } from "node:fs";

const CPU = "/sys/devices/system/cpu/cpu0";

/**
 * What Linux in a machine of type `microvm` must be told under tcg. Such a machine has no timer but the processor's counter,
 * whose speed the kernel finds out by counting for some milliseconds: on a busy host that fails now and then, and then it
 * waits for ever; later the same comparison has it distrust the counter and lose time. Under tcg the guest's counter is
 * the host's own. Not for KVM, which tells the guest itself, nor for `q35`, which has timers to compare with.
 */
export function clockArguments(): string[] {
  const khz = counterKhz();
  return ["tsc=reliable", ...(khz === undefined ? [] : [`tsc_early_khz=${khz}`])];
}

/** The speed of this processor's counter in kHz, where the machine says it. */
function counterKhz(): number | undefined {
  if (existsSync(`${CPU}/tsc_freq_khz`)) return Number(readFileSync(`${CPU}/tsc_freq_khz`, "latin1"));
  const info = readFileSync("/proc/cpuinfo", "latin1");
  // Where the processor's own speed changes, it is not the counter's, which has that of the name on the box.
  const found = existsSync(`${CPU}/cpufreq`)
    ? 1e6 * Number(/^model name\s*:.*@ ([\d.]+)GHz/m.exec(info)?.[1])
    : 1e3 * Number(/^cpu MHz\s*: ([\d.]+)$/m.exec(info)?.[1]);
  return found > 0 ? Math.round(found) : undefined;
}
