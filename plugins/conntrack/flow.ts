/** What a source of conntrack says and to whom; the sources are in netlink.ts and program.ts. */
import type { Logger } from "@logtape/logtape";
import type { Flow, FlowKind } from "../../main.ts";
import type { WatchedAddresses } from "./addresses.ts";

/** TCP's states by their number in the kernel (`enum tcp_conntrack` of linux/netfilter/nf_conntrack_tcp.h). */
const TCP_STATES = [
  "NONE",
  "SYN_SENT",
  "SYN_RECV",
  "ESTABLISHED",
  "FIN_WAIT",
  "CLOSE_WAIT",
  "LAST_ACK",
  "TIME_WAIT",
  "CLOSE",
  "SYN_SENT2",
];

/** The name that the kernel and the `conntrack` program share, `UNKNOWN_12` where there is none. */
export function tcpState(number: number): string {
  return TCP_STATES[number] ?? `UNKNOWN_${number}`;
}

/**
 * Who hears of it. After `lost`, events are missing until the next `connected`: what is there then must be dumped. What
 * a method throws is logged and counted, and ends nothing.
 */
export interface ConntrackListener {
  /**
   * The flow's destination is spelled as it was watched. An update of TCP with an empty state is about something else,
   * such as the mark, and leaves the state as it was.
   */
  event(kind: FlowKind, flow: Flow): void;
  /** `overflow`, or why the stream ended. May come several times before the next `connected`. */
  lost(reason: string): void;
  /** The subscription is in place: a dump from here on misses nothing that the events do not tell. */
  connected(): void;
}

export interface ConntrackStats {
  readonly connected: boolean;
  /** Handed to the listener. */
  readonly events: number;
  /** Messages or lines read, of events and of dumps. */
  readonly messages: number;
  /** Of these, those of other protocols or for addresses that are not watched. */
  readonly skipped: number;
  /** Of these, those that could not be read. */
  readonly malformed: number;
  readonly overflows: number;
  /** Streams that ended otherwise. */
  readonly disconnects: number;
  readonly listener_errors: number;
  /** Bytes that the kernel holds for events not read yet; 0 where that is not known. */
  readonly receive_buffer: number;
}

/** Reads the conntrack table of this process's network namespace, and hears of its changes. */
export interface ConntrackSource {
  readonly name: "netlink" | "program";
  /** Subscribes, and again whenever the stream ends, until it is closed. Once only. */
  start(listener: ConntrackListener): void;
  /**
   * Every flow of the table to a watched address, or to those of `addresses`, IPv4 and IPv6. The netlink source delivers
   * the events of all that happened before the call before this resolves; of the program's, some may come late.
   *
   * @throws {Error} where the table could not be read whole, or with the reason of `signal`
   */
  dump(options?: { addresses?: ReadonlySet<string>; signal?: AbortSignal }): Promise<Flow[]>;
  /** Nothing is delivered any more; resolves once sockets and processes are gone. */
  close(): Promise<void>;
  stats(): ConntrackStats;
}

export interface SourceOptions {
  log: Logger;
  /** Without it, every flow is told of. */
  watched?: WatchedAddresses;
}
