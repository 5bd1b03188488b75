import { abortable, deadline, delay } from "../shared/async.ts";
import { dialProbe } from "../shared/probe-ports.ts";

const FIRST_MS = 25;
const LONGEST_MS = 500;
/** Milliseconds that one probe may take: a SYN that got lost is sent again only after a second. */
const PROBE_MS = 1_000;

/** What is to be probed: where, for how long (milliseconds), and what else has to pass once the port answers. */
export interface Probe {
  readonly host: string;
  /** Its IPv6 address, where the kernel is to forward that as well. */
  readonly host6: string | null;
  readonly port: number;
  readonly timeout: number;
  readonly passes?: (signal: AbortSignal) => Promise<void>;
}

interface Flight {
  readonly abort: AbortController;
  readonly answered: Promise<boolean>;
}

/**
 * Which ports of which instances are known to answer since they run. One probe serves all who wait for a port, and goes
 * on when the first of them leaves.
 */
export class Readiness implements Disposable {
  readonly #settled = new Map<string, Set<number>>();
  readonly #by6 = new Map<string, Set<number>>();
  readonly #flights = new Map<string, Map<number, Flight>>();
  readonly #closing = new AbortController();

  /** Whether the port answers, or was given up: from then on it is as with any machine, refused when closed. */
  isSettled(id: string, port: number): boolean {
    return this.#settled.get(id)?.has(port) ?? false;
  }

  settle(id: string, port: number): void {
    entry(this.#settled, id, () => new Set<number>()).add(port);
  }

  /** Whether it is known to answer by IPv6 as well. */
  answersBy6(id: string, port: number): boolean {
    return this.#by6.get(id)?.has(port) ?? false;
  }

  /** Tries that once. */
  async look6(id: string, { host6, port }: Probe): Promise<boolean> {
    if (host6 === null) return false;
    try {
      (await dialProbe(host6, port, { signal: this.#closing.signal, timeout: PROBE_MS })).destroy();
    } catch {
      return false; // as most do not
    }
    entry(this.#by6, id, () => new Set<number>()).add(port);
    return true;
  }

  /** The instance does not serve any more; who waits is told at once. */
  forget(id: string): void {
    this.#settled.delete(id);
    this.#by6.delete(id);
    for (const { abort } of this.#flights.get(id)?.values() ?? []) abort.abort();
    this.#flights.delete(id);
  }

  /** Resolves to whether the port answers, at the latest after the probe's own time; rejects only with the signal. */
  async wait(id: string, probe: Probe, signal?: AbortSignal): Promise<boolean> {
    if (this.isSettled(id, probe.port)) return true;
    const flights = entry(this.#flights, id, () => new Map<number, Flight>());
    let flight = flights.get(probe.port);
    if (!flight) {
      const abort = new AbortController();
      const answered = this.#run(id, probe, abort.signal).finally(() => flights.delete(probe.port));
      flights.set(probe.port, flight = { abort, answered });
    }
    return await (signal ? abortable(flight.answered, signal) : flight.answered);
  }

  [Symbol.dispose](): void {
    this.#closing.abort();
    for (const id of [...this.#flights.keys()]) this.forget(id);
  }

  async #run(id: string, probe: Probe, forgotten: AbortSignal): Promise<boolean> {
    const late = new AbortController();
    const signal = AbortSignal.any([forgotten, late.signal]);
    const answered = await deadline(poll(probe, signal), probe.timeout, "The probe").then(() => true, () => false);
    late.abort();
    if (answered && !forgotten.aborted) await this.look6(id, probe);
    if (!forgotten.aborted) this.settle(id, probe.port);
    return answered;
  }
}

async function poll({ host, port, passes }: Probe, signal: AbortSignal): Promise<void> {
  for (let pause = FIRST_MS;; pause = Math.min(pause * 2, LONGEST_MS)) {
    try {
      (await dialProbe(host, port, { signal, timeout: PROBE_MS })).destroy();
      return await passes?.(signal);
    } catch {
      // Not yet: that it does not answer is what is being waited out.
      signal.throwIfAborted();
    }
    await delay(pause, { signal });
  }
}

function entry<K, V>(map: Map<K, V>, key: K, make: () => V): V {
  let value = map.get(key);
  if (value === undefined) map.set(key, value = make());
  return value;
}
