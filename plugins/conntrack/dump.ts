import type { Flow } from "../../main.ts";
import { delay } from "../shared/async.ts";
import type { WatchedAddresses } from "./addresses.ts";
import { errnoName, NetlinkSocket } from "./libc.ts";
import { type Counts, type DumpEnd, dumpRequest, MessageReader } from "./message.ts";

/** A dump comes in datagrams of at most 32 KiB. */
const SLOTS = { slots: 4, slotSize: 64 * 1024 };
const ATTEMPTS = 4;
/** Milliseconds without an answer until it is given up. */
const SILENCE = 5_000;

export interface DumpOptions {
  signal: AbortSignal;
  counts: Counts;
  watched?: WatchedAddresses;
}

/**
 * The conntrack table by netlink, on a socket of its own, so that several dumps never meet.
 *
 * @throws {Error} where the kernel refuses or interrupts it, or with the signal's reason
 */
export async function dumpTable(options: DumpOptions): Promise<Flow[]> {
  for (let attempt = 0; attempt < ATTEMPTS; attempt++) {
    const flows = await attemptDump(options);
    if (flows) return flows;
  }
  throw new Error(`Cannot dump conntrack: it was interrupted ${ATTEMPTS} times`);
}

/** Undefined where the kernel says that the table changed too much under it. */
async function attemptDump({ signal, counts, watched }: DumpOptions): Promise<Flow[] | undefined> {
  signal.throwIfAborted();
  using socket = new NetlinkSocket({ groups: 0, ...SLOTS });
  const own: Counts = { messages: 0, skipped: 0, malformed: 0 };
  const reader = new MessageReader(socket.bytes, own, watched);
  const flows: Flow[] = [];
  const end: DumpEnd = { done: false, interrupted: false, error: 0 };
  await socket.sendAside(dumpRequest(1));
  let heard = performance.now();
  while (!end.done) {
    const count = await socket.receiveAside();
    for (let slot = 0; slot < count; slot++) {
      if (socket.truncated(slot)) throw new Error("Cannot dump conntrack: a datagram did not fit");
      const start = slot * SLOTS.slotSize;
      reader.read(start, start + socket.length(slot), (_, flow) => void flows.push(flow), end);
    }
    const now = performance.now();
    if (count > 0) heard = now;
    else if (now - heard > SILENCE) throw new Error(`Cannot dump conntrack: no answer for ${SILENCE} ms`);
    // Receiving is what makes the kernel write the next part, so there is nothing to wait for unless it lacks memory.
    if (count === 0) await delay(1);
    signal.throwIfAborted();
  }
  counts.messages += own.messages;
  counts.skipped += own.skipped;
  counts.malformed += own.malformed;
  // What cannot be read might be the one flow that keeps an instance awake.
  if (own.malformed > 0) throw new Error(`Cannot dump conntrack: ${own.malformed} messages could not be read`);
  if (end.error !== 0) throw new Error(`Cannot dump conntrack: ${errnoName(end.error)}`);
  return end.interrupted ? undefined : flows;
}
