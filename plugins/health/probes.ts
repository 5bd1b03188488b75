import type { Socket } from "node:net";
import type { Hypervisor, Instance } from "../../main.ts";
import { abortable } from "../shared/async.ts";
import { messageOf } from "../shared/errors.ts";
import { dialProbe } from "../shared/probe-ports.ts";
import { get } from "./http.ts";
import type { Check } from "./policy.ts";

/** Beyond it a timer fires at once. The signal is what ends a probe. */
const NO_TIMEOUT = 2 ** 31 - 1;
/** Bytes of a command's output, of which the error has the first. */
const OUTPUT = 1024;

/** Resolves where the instance answers as its check wants it. @throws {Error} why not, for people; the signal's reason */
export type Probe = (instance: Instance, check: Check, signal: AbortSignal) => Promise<void>;

/** `addressOf` is where the instance listens, null where it has no address. */
export function probeWith(hypervisor: Hypervisor, addressOf: (instance: Instance) => string | null): Probe {
  return async (instance, { kept, timeout }, signal) => {
    if (kept.type === "exec") {
      const driver = hypervisor.driverOf(instance, "exec");
      const { command, working_dir } = kept.exec;
      const request = { command, timeout_ms: timeout, max_output: OUTPUT, signal, ...(working_dir && { working_dir }) };
      // A driver that does not heed the signal holds up this probe only.
      const { exit_code, timed_out, stderr, stdout } = await abortable(driver.exec(instance, request), signal);
      if (timed_out) throw new Error(`No end within ${kept.timeout}`);
      const said = (stderr.trim() || stdout.trim()).replace(/^(?=.)/, ": ");
      if (exit_code !== 0) throw new Error(`Exit code is ${exit_code}${said}`);
      return;
    }
    const host = addressOf(instance);
    if (host === null) throw new Error("The instance has no address");
    const { port } = kept.type === "http" ? kept.http : kept.tcp;
    const socket = await dial(host, port, signal);
    // Not by an orderly end: the kernel remembers each for a minute or two, so 120,000 where 1,000 are probed a second.
    const close = () => void socket.resetAndDestroy();
    signal.addEventListener("abort", close, { once: true });
    try {
      if (kept.type === "http") await abortable(get(socket, host, kept.http, close), signal);
    } finally {
      signal.removeEventListener("abort", close);
      close();
    }
  };
}

async function dial(host: string, port: number, signal: AbortSignal): Promise<Socket> {
  try {
    return await dialProbe(host, port, { signal, timeout: NO_TIMEOUT });
  } catch (error) {
    signal.throwIfAborted();
    const reason = (error as NodeJS.ErrnoException).code ?? messageOf(error);
    throw new Error(`Cannot connect to ${host}:${port}: ${reason}`, { cause: error });
  }
}
