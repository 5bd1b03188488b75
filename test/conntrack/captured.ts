/**
 * One history that the kernel told over netlink and to the `conntrack` program at the same time, and the table at its
 * end: connections over IPv4, IPv6 and through a DNAT, one that was refused and marked, UDP, and a ping.
 */
import { Buffer } from "node:buffer";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import type { Flow, FlowKind } from "../../main.ts";
import type { WatchedAddresses } from "../../plugins/conntrack/addresses.ts";
import { LineReader } from "../../plugins/conntrack/line.ts";
import { type DumpEnd, MessageReader } from "../../plugins/conntrack/message.ts";

const text = (name: string) => readFileSync(join(import.meta.dirname!, "fixtures", name), "utf8").trimEnd().split("\n");

export const DATAGRAMS = text("events.hex").map((line) => Uint8Array.from(Buffer.from(line, "hex")));
export const TABLE_DATAGRAMS = text("table.hex").map((line) => Uint8Array.from(Buffer.from(line, "hex")));
export const LINES = text("events.txt");
export const TABLE_LINES = text("table.txt");

export type Told = [kind: FlowKind, flow: Flow];
export const counts = () => ({ messages: 0, skipped: 0, malformed: 0 });

/** What a reader makes of datagrams, each read at an odd place of a larger buffer. */
export function readDatagrams(
  datagrams: readonly Uint8Array[],
  { watched, dump }: { watched?: WatchedAddresses; dump?: DumpEnd } = {},
) {
  const told: Told[] = [];
  const counted = counts();
  for (const datagram of datagrams) {
    const buffer = new Uint8Array(datagram.length + 24).fill(0xff);
    buffer.set(datagram, 13);
    const reader = new MessageReader(buffer, counted, watched);
    reader.read(13, 13 + datagram.length, (kind, flow) => void told.push([kind, flow]), dump);
  }
  return { told, counts: counted };
}

export function readLines(lines: readonly string[], watched?: WatchedAddresses) {
  const told: Told[] = [];
  const counted = counts();
  const reader = new LineReader(counted, watched);
  for (const line of lines) reader.read(line, (kind, flow) => void told.push([kind, flow]));
  return { told, counts: counted };
}
