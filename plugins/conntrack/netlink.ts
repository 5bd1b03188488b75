import { constants } from "node:os";
import { setImmediate } from "node:timers/promises";
import type { Flow } from "../../main.ts";
import { delay } from "../shared/async.ts";
import { messageOf } from "../shared/errors.ts";
import { WatchedAddresses } from "./addresses.ts";
import { Backoff } from "./backoff.ts";
import { dumpTable } from "./dump.ts";
import type { ConntrackListener, ConntrackSource, ConntrackStats, SourceOptions } from "./flow.ts";
import { NetlinkSocket, SystemError, Waker } from "./libc.ts";
import { MessageReader } from "./message.ts";
import { Reports, told } from "./reports.ts";

/** Bits of NFNLGRP_CONNTRACK_NEW, _UPDATE and _DESTROY. */
const GROUPS = 0b111;
/** Asked of the kernel, which doubles it; of a default buffer, a busy host loses events every minute. */
const RECEIVE_BUFFER = 40 * 1024 * 1024;
/** An event is 200 to 400 bytes and a datagram of its own. */
const EVENT_SLOTS = { slots: 128, slotSize: 4096 };
/**
 * Milliseconds between two looks while events come. The first after a pause is seen at once, by a thread that polls;
 * later ones wait for this long and are then read many at a time, which costs a tenth of waking for each.
 */
const PAUSE = 10;
/** Calls that receive before others have their turn. */
const ROUNDS = 32;
/** Times that as much is drained after a dump: enough for a full buffer of what happened before it. */
const DRAINS = 32;
const { ENOBUFS } = constants.errno;

export interface NetlinkOptions extends SourceOptions {
  /** Bytes; 40 MiB when absent. */
  receiveBuffer?: number;
}

/** Conntrack by netlink. @throws {Error} where there is no FFI */
export class NetlinkSource implements ConntrackSource {
  readonly name = "netlink";
  readonly #options: NetlinkOptions;
  readonly #waker = new Waker();
  readonly #dumps = new Set<Promise<Flow[]>>();
  readonly #counts = { messages: 0, skipped: 0, malformed: 0 };
  readonly #closing = new AbortController();
  #socket: NetlinkSocket | undefined;
  #reader: MessageReader | undefined;
  /** What ended the stream, found by whoever received last. */
  #broken: unknown;
  #reports: Reports | undefined;
  #running: Promise<void> | undefined;
  #closed: Promise<void> | undefined;

  constructor(options: NetlinkOptions) {
    this.#options = options;
  }

  start(listener: ConntrackListener): void {
    if (this.#running) throw new TypeError("Cannot start the conntrack source: it was started before");
    this.#reports = new Reports(listener, this.#options.log);
    this.#running = this.#run(this.#reports);
  }

  async dump({ addresses, signal }: { addresses?: ReadonlySet<string>; signal?: AbortSignal } = {}): Promise<Flow[]> {
    const watched = addresses ? new WatchedAddresses(addresses) : this.#options.watched;
    const closing = this.#closing.signal;
    const dumping = this.#dump(watched, signal ? AbortSignal.any([signal, closing]) : closing);
    this.#dumps.add(dumping);
    try {
      return await dumping;
    } finally {
      this.#dumps.delete(dumping);
    }
  }

  close(): Promise<void> {
    return this.#closed ??= this.#close();
  }

  stats(): ConntrackStats {
    return { ...told(this.#reports), ...this.#counts, receive_buffer: this.#socket?.receiveBuffer ?? 0 };
  }

  async #run(reports: Reports): Promise<void> {
    const backoff = new Backoff();
    // The listener hears nothing before start() has returned.
    await setImmediate();
    while (!this.#closing.signal.aborted) {
      try {
        const socket = this.#subscribe();
        backoff.connected();
        reports.isConnected();
        await this.#listen(socket);
      } catch (error) {
        this.#broken = undefined;
        this.#waker.clear();
        // A new socket: into this one the kernel drops all that comes until it was read empty, and says so only once.
        if (error instanceof SystemError && error.errno === ENOBUFS) {
          reports.overflow();
          continue;
        }
        this.#forget();
        reports.ended(messageOf(error));
        await delay(backoff.next(), { signal: this.#closing.signal }).catch(() => {});
      }
    }
  }

  #subscribe(): NetlinkSocket {
    const { receiveBuffer = RECEIVE_BUFFER, watched } = this.#options;
    const socket = new NetlinkSocket({ groups: GROUPS, receiveBuffer, ...EVENT_SLOTS });
    // Only now: the kernel makes flows that will never send events while nobody listens.
    this.#forget();
    this.#reader = new MessageReader(socket.bytes, this.#counts, watched);
    return this.#socket = socket;
  }

  #forget(): void {
    this.#socket?.[Symbol.dispose]();
    this.#socket = undefined;
  }

  async #listen(socket: NetlinkSocket): Promise<void> {
    while (!this.#closing.signal.aborted) {
      await socket.readable(this.#waker);
      const more = this.#drain();
      if (this.#broken) throw this.#broken;
      await (more ? setImmediate() : delay(PAUSE));
    }
  }

  /** Delivers what waits; whether there may be more. */
  #drain(): boolean {
    const socket = this.#socket;
    if (!socket || this.#broken) return false;
    const { slots, slotSize } = EVENT_SLOTS;
    try {
      for (let round = 0; round < ROUNDS; round++) {
        const count = socket.receive();
        for (let slot = 0; slot < count; slot++) {
          const start = slot * slotSize;
          if (socket.truncated(slot)) this.#counts.malformed++;
          else this.#reader!.read(start, start + socket.length(slot), this.#reports!.event);
        }
        if (count < slots) return false;
      }
      return true;
    } catch (error) {
      this.#broken = error;
      return false;
    }
  }

  async #dump(watched: WatchedAddresses | undefined, signal: AbortSignal): Promise<Flow[]> {
    const flows = await dumpTable({ signal, counts: this.#counts, watched });
    for (let drains = 0; this.#drain() && drains < DRAINS; drains++) await setImmediate();
    if (this.#broken) this.#waker.wake();
    return flows;
  }

  async #close(): Promise<void> {
    this.#closing.abort(new Error("The conntrack source is closing"));
    this.#reports?.close();
    this.#waker.wake();
    // What they use must not be closed under them.
    await Promise.allSettled([this.#running, ...this.#dumps]);
    this.#forget();
    this.#waker[Symbol.dispose]();
  }
}
