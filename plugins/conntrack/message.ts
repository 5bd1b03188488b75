/**
 * Reads conntrack's netlink messages (linux/netlink.h, linux/netfilter/nfnetlink_conntrack.h). Headers are in the
 * machine's order, which is little-endian wherever Deno runs; what attributes hold is big-endian.
 */
import type { Flow, FlowKind } from "../../main.ts";
import { AddressTexts, type WatchedAddresses } from "./addresses.ts";
import { tcpState } from "./flow.ts";

const HEADER = 16; // nlmsghdr
const FAMILY_HEADER = 4; // nfgenmsg
const NOOP = 1, ERROR = 2, DONE = 3, OVERRUN = 4;
const NEW_FLOW = 0x100, DESTROYED_FLOW = 0x102; // NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_*
const MADE_NOW = 0x600; // NLM_F_CREATE | NLM_F_EXCL
const INTERRUPTED = 0x10; // NLM_F_DUMP_INTR
const GET_FLOWS = 0x101, REQUEST_DUMP = 0x301; // IPCTNL_MSG_CT_GET; NLM_F_REQUEST | NLM_F_DUMP
const ATTRIBUTE = 4; // nlattr
const CTA_TUPLE_ORIG = 1, CTA_TUPLE_REPLY = 2, CTA_PROTOINFO = 4;
const CTA_TUPLE_IP = 1, CTA_TUPLE_PROTO = 2;
const CTA_PROTO_NUM = 1, CTA_PROTO_SRC_PORT = 2, CTA_PROTO_DST_PORT = 3;
const CTA_PROTOINFO_TCP = 1, CTA_PROTOINFO_TCP_STATE = 1;
const BOTH_TUPLES = CTA_TUPLE_ORIG | CTA_TUPLE_REPLY;
/** The type of the source's attribute, the destination's is the next one, and the bytes of each. */
const V4_ENDPOINTS = [1, 4], V6_ENDPOINTS = [3, 16];
const INET = 2, INET6 = 10; // AF_*
const TCP = 6, UDP = 17;

/** Where in the message one direction's parts are. */
interface Tuple {
  source: number;
  destination: number;
  protocol: number;
  source_port: number;
  destination_port: number;
}
const tuple = (): Tuple => ({ source: -1, destination: -1, protocol: -1, source_port: -1, destination_port: -1 });

/** What was read, and of that what was not wanted and what made no sense. */
export interface Counts {
  messages: number;
  skipped: number;
  malformed: number;
}

/** How a dump ended, as far as the messages told; `error` is an errno. */
export interface DumpEnd {
  done: boolean;
  interrupted: boolean;
  error: number;
}

/** Reads the messages in one buffer, which is filled again and again. Nothing that is in it makes it throw or loop. */
export class MessageReader {
  readonly #view: DataView;
  readonly #counts: Counts;
  readonly #watched: WatchedAddresses | undefined;
  readonly #texts = new AddressTexts();
  // Made once: at 100,000 messages a second, garbage is the cost.
  readonly #original = tuple();
  readonly #reply = tuple();
  #into = this.#original;
  #tuples = 0;
  #unwanted = false;
  #family: 4 | 6 = 4;
  #destination = "";
  #state = 0;

  /** Adds to `counts`. Without `watched`, every flow is delivered. */
  constructor(buffer: Uint8Array, counts: Counts, watched?: WatchedAddresses) {
    this.#counts = counts;
    this.#view = new DataView(buffer.buffer, buffer.byteOffset, buffer.byteLength);
    this.#watched = watched;
  }

  /** Reads the messages from `start` to `end`; what ends a dump is noted in `dump`. */
  read(start: number, end: number, deliver: (kind: FlowKind, flow: Flow) => void, dump?: DumpEnd): void {
    const view = this.#view;
    let at = start;
    while (at < end) {
      this.#counts.messages++;
      const length = end - at < HEADER ? 0 : view.getUint32(at, true);
      // Where one message ends is unknown, there the next begins anywhere.
      if (length < HEADER || at + length > end) return void this.#counts.malformed++;
      const type = view.getUint16(at + 4, true);
      const flags = view.getUint16(at + 6, true);
      if (dump && flags & INTERRUPTED) dump.interrupted = true;
      if (type === NEW_FLOW || type === DESTROYED_FLOW) {
        const flow = this.#flow(at + HEADER, at + length);
        const kind = type === DESTROYED_FLOW ? "destroy" : (flags & MADE_NOW) === MADE_NOW ? "new" : "update";
        if (flow) deliver(kind, flow);
      } else if (dump && (type === DONE || type === ERROR)) {
        dump.done = true;
        // Of a dump that failed half-way, DONE carries the error.
        if (length >= HEADER + 4) dump.error = -view.getInt32(at + HEADER, true);
      } else if (type === NOOP || type === ERROR || type === DONE || type === OVERRUN) this.#counts.skipped++;
      else this.#counts.malformed++;
      at += (length + 3) & ~3;
    }
  }

  /** Undefined, and counted, where it is not wanted or cannot be read. */
  #flow(start: number, end: number): Flow | undefined {
    const view = this.#view;
    const original = this.#original, reply = this.#reply;
    const family = end - start < FAMILY_HEADER ? -1 : view.getUint8(start);
    if (family !== INET && family !== INET6) {
      return void (family < 0 ? this.#counts.malformed++ : this.#counts.skipped++);
    }
    this.#family = family === INET ? 4 : 6;
    this.#state = -1;
    this.#tuples = 0;
    this.#unwanted = false;
    const whole = this.#each(start + FAMILY_HEADER, end, this.#attribute);
    if (this.#unwanted) return void this.#counts.skipped++;
    if (!whole || this.#tuples !== BOTH_TUPLES) return void this.#counts.malformed++;
    return {
      protocol: original.protocol === TCP ? "tcp" : "udp",
      source: this.#texts.at(view, original.source, this.#family),
      source_port: view.getUint16(original.source_port),
      destination: this.#destination,
      destination_port: view.getUint16(reply.source_port),
      state: this.#state < 0 ? "" : tcpState(this.#state),
    };
  }

  /** Shows each attribute to `visit`; false where one is malformed, by its length or as `visit` finds it. */
  #each(start: number, end: number, visit: (type: number, from: number, to: number) => boolean): boolean {
    let at = start;
    while (at + ATTRIBUTE <= end) {
      const length = this.#view.getUint16(at, true);
      if (length < ATTRIBUTE || at + length > end) return false;
      // The upper two bits are flags.
      if (!visit(this.#view.getUint16(at + 2, true) & 0x3fff, at + ATTRIBUTE, at + length)) return false;
      at += (length + 3) & ~3;
    }
    return at >= end;
  }

  readonly #attribute = (type: number, from: number, to: number): boolean => {
    if (type === CTA_TUPLE_ORIG || type === CTA_TUPLE_REPLY) {
      if (!this.#tuple(type === CTA_TUPLE_ORIG ? this.#original : this.#reply, from, to)) return false;
      this.#tuples |= type;
      if (this.#tuples === BOTH_TUPLES && this.#original.protocol !== this.#reply.protocol) return false;
      // The kernel writes both first, so what is not wanted ends here.
      this.#unwanted = this.#tuples === BOTH_TUPLES && !this.#wanted();
      return !this.#unwanted;
    }
    if (type === CTA_PROTOINFO) return this.#each(from, to, this.#protocolInfo);
    return true;
  };

  /** Whether it is of TCP or UDP and to a watched address, which it notes. */
  #wanted(): boolean {
    const { protocol } = this.#reply;
    if (protocol !== TCP && protocol !== UDP) return false;
    // Who answers is who it really goes to, whatever address was dialled.
    const server = this.#reply.source;
    const watched = this.#watched ?? this.#texts;
    const destination = watched.at(this.#view, server, this.#family);
    if (destination !== undefined) this.#destination = destination;
    return destination !== undefined;
  }

  /** Notes where a direction's parts are; false where one is missing. */
  #tuple(tuple: Tuple, from: number, to: number): boolean {
    tuple.source = tuple.destination = tuple.protocol = -1;
    tuple.source_port = tuple.destination_port = -1;
    this.#into = tuple;
    if (!this.#each(from, to, this.#tuplePart)) return false;
    const { source, destination, protocol, source_port, destination_port } = tuple;
    if (source < 0 || destination < 0 || protocol < 0) return false;
    return (protocol !== TCP && protocol !== UDP) || (source_port >= 0 && destination_port >= 0);
  }

  readonly #tuplePart = (type: number, from: number, to: number): boolean => {
    if (type === CTA_TUPLE_IP) return this.#each(from, to, this.#endpoint);
    return type !== CTA_TUPLE_PROTO || this.#each(from, to, this.#port);
  };

  readonly #endpoint = (type: number, from: number, to: number): boolean => {
    // CTA_IP_V4_SRC and CTA_IP_V4_DST are 1 and 2, CTA_IP_V6_SRC and CTA_IP_V6_DST are 3 and 4.
    const [first, size] = this.#family === 4 ? V4_ENDPOINTS : V6_ENDPOINTS;
    if (type !== first && type !== first + 1) return true;
    if (type === first) this.#into.source = from;
    else this.#into.destination = from;
    return to - from === size;
  };

  readonly #port = (type: number, from: number, to: number): boolean => {
    const size = to - from;
    if (type === CTA_PROTO_NUM) {
      if (size !== 1) return false;
      this.#into.protocol = this.#view.getUint8(from);
    } else if (type === CTA_PROTO_SRC_PORT) {
      this.#into.source_port = from;
      return size === 2;
    } else if (type === CTA_PROTO_DST_PORT) {
      this.#into.destination_port = from;
      return size === 2;
    }
    return true;
  };

  readonly #protocolInfo = (type: number, from: number, to: number): boolean =>
    type !== CTA_PROTOINFO_TCP || this.#each(from, to, this.#tcpInfo);

  readonly #tcpInfo = (type: number, from: number, to: number): boolean => {
    if (type !== CTA_PROTOINFO_TCP_STATE) return true;
    if (to - from !== 1) return false;
    this.#state = this.#view.getUint8(from);
    return true;
  };
}

/** The request for the whole table, of both families. */
export function dumpRequest(sequence: number): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(HEADER + FAMILY_HEADER);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, bytes.length, true);
  view.setUint16(4, GET_FLOWS, true);
  view.setUint16(6, REQUEST_DUMP, true);
  view.setUint32(8, sequence, true);
  return bytes;
}
