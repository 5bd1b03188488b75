import type { Instance } from "../../main.ts";
import { delay } from "../shared/async.ts";
import { dialProbe } from "../shared/probe-ports.ts";
import { processAge, type ProcessId } from "../shared/proc.ts";
import type { Agent } from "./agent.ts";
import type { Image } from "./image.ts";
import type { GuestNetwork } from "./machine.ts";
import { identify, reseed, setClock } from "./tasks.ts";

/** Milliseconds between two attempts to reach a port that does not answer. */
const RETRY_MS = 100;
/** Milliseconds in which a guest is told after a restore what it could not notice, before it counts as running. */
const FRESHEN_MS = 2_000;
/** Milliseconds by which a guest's clock may be off. */
const EXACT_MS = 100;

/** Milliseconds that a guest has at least to answer a host that has just found it: it may be ready for long. */
const FOUND_MS = 10_000;
/** Beyond it timers fire at once. */
const LONGEST_MS = 2 ** 31 - 1;

/** What has to answer before a guest counts as running. */
export interface Readiness {
  readonly agent: boolean;
  readonly port: { readonly host: string; readonly port: number } | null;
}

/** What the image says of it. A guest that runs another program than its image's is not asked on that one's port. */
export function readinessOf({ network, entrypoint, cmd }: Instance, { agent, ready_port }: Image): Readiness {
  const own = entrypoint.length + cmd.length === 0;
  const port = ready_port !== undefined && network.ip !== null && own ? { host: network.ip, port: ready_port } : null;
  return { agent, port };
}

export function isAtOnce({ agent, port }: Readiness): boolean {
  return !agent && port === null;
}

/** Resolves once all of it has answered. @throws the signal's reason */
export async function untilReady({ agent, port }: Readiness, guest: Agent, signal: AbortSignal): Promise<void> {
  if (agent) await guest.ready({ signal });
  while (port && !await answers(port.host, port.port, signal)) await delay(RETRY_MS, { signal });
}

/** Milliseconds that a machine started as `main` still has of its time to become ready; all that there are with 0. */
export function timeLeft(main: ProcessId, timeout: number): number {
  if (timeout === 0) return Infinity;
  return Math.max(timeout - processAge(main), Math.min(timeout, FOUND_MS));
}

/** Aborts when that time is over. */
export function bootDeadline(main: ProcessId, timeout: number): AbortSignal {
  const left = timeLeft(main, timeout);
  return left > LONGEST_MS ? new AbortController().signal : AbortSignal.timeout(Math.round(left));
}

async function answers(host: string, port: number, signal: AbortSignal): Promise<boolean> {
  try {
    const socket = await dialProbe(host, port, { signal, timeout: 1_000 });
    socket.destroy();
    return true;
  } catch (error) {
    if (signal.aborted) throw error;
    return false; // not yet
  }
}

/**
 * After a restore: its clock stood still. `told` as for {@linkcode setClock}. Resolves to whether it is sure to be right.
 *
 * @throws where the guest did not take it up in time
 */
export async function rewind(agent: Agent, signal: AbortSignal, told: () => void): Promise<boolean> {
  const late = AbortSignal.any([signal, AbortSignal.timeout(FRESHEN_MS)]);
  // Few, so that a slow one has time for them; it is asked again.
  const { offset, uncertainty } = await setClock(agent, { signal: late, timeout: FRESHEN_MS, rounds: 2, told });
  return Math.abs(offset) + uncertainty <= EXACT_MS;
}

/** Two machines that are made of one memory would have the same random numbers. @throws as {@linkcode rewind} */
export async function refresh(agent: Agent, signal: AbortSignal): Promise<void> {
  await reseed(agent, { signal: AbortSignal.any([signal, AbortSignal.timeout(FRESHEN_MS)]), timeout: FRESHEN_MS });
}

/**
 * Makes a guest that was made of another's memory one of its own.
 *
 * @throws where the guest did not take all of it up; it can be told again
 */
export async function settleIn(
  agent: Agent,
  { name: hostname }: Instance,
  network: GuestNetwork | null,
  signal: AbortSignal,
): Promise<void> {
  const place = network && {
    mac: network.mac,
    ip: network.address,
    gateway: network.gateway,
    ...(network.address6 !== null && network.gateway6 !== null &&
      { ip6: network.address6, gateway6: network.gateway6 }),
  };
  await agent.ready({ signal });
  await reseed(agent, { signal });
  await identify(agent, { hostname, ...place }, { signal });
  // Sooner rather than later, for it is on no network before.
  await setClock(agent, { signal, within: EXACT_MS, rounds: 8 });
}
