/** Reads the lines of the `conntrack` program, of its events and of its table. */
import { isIP } from "node:net";
import ipaddr from "ipaddr.js";
import type { Flow, FlowKind } from "../../main.ts";
import type { WatchedAddresses } from "./addresses.ts";
import type { Counts } from "./message.ts";

const KINDS: readonly [prefix: string, kind: FlowKind][] = [
  ["[NEW]", "new"],
  ["[UPDATE]", "update"],
  ["[DESTROY]", "destroy"],
];
// `tcp      6 431999 ESTABLISHED src=...`; without the timeout for a flow that is destroyed, or was handed to hardware.
const HEAD = /^(\S+) +\d+(?: \d+)?(?: ([A-Z][A-Z0-9_]*))? $/;

/** Characters; the program's lines have some hundred. */
const LONGEST = 64 * 1024;

/** Reads lines one by one. Nothing that is in one makes it throw. */
export class LineReader {
  readonly #counts: Counts;
  readonly #watched: WatchedAddresses | undefined;

  /** Adds to `counts`. Without `watched`, every flow is delivered. */
  constructor(counts: Counts, watched?: WatchedAddresses) {
    this.#counts = counts;
    this.#watched = watched;
  }

  /** A line without its newline; those of a table have no kind, and are delivered as `update`. */
  read(line: string, deliver: (kind: FlowKind, flow: Flow) => void): void {
    this.#counts.messages++;
    const original = line.indexOf("src=");
    // The first field of the reply direction.
    const reply = line.indexOf(" src=", original + 4) + 1;
    if (original < 0 || reply === 0) return void this.#counts.malformed++;
    const server = textAt(line, reply + 4);
    const known = this.#watched?.named(server);
    if (this.#watched && known === undefined) {
      return void (isIP(server) ? this.#counts.skipped++ : this.#counts.malformed++);
    }
    let start = 0;
    while (line.charCodeAt(start) === 32) start++;
    let kind: FlowKind = "update";
    if (line[start] === "[") {
      const [prefix, named] = KINDS.find(([prefix]) => line.startsWith(prefix, start)) ?? [];
      if (prefix === undefined) return void this.#counts.malformed++;
      kind = named!;
      start += prefix.length + 1;
    }
    const [, protocol, state = ""] = HEAD.exec(line.slice(start, original)) ?? [];
    if (protocol === undefined) return void this.#counts.malformed++;
    if (protocol !== "tcp" && protocol !== "udp") return void this.#counts.skipped++;
    const source = canonical(textAt(line, original + 4));
    const destination = known ?? canonical(server);
    const source_port = portOf(line, original, reply);
    const destination_port = portOf(line, reply, line.length);
    if (!source || !destination || source_port === undefined || destination_port === undefined) {
      return void this.#counts.malformed++;
    }
    deliver(kind, { protocol, source, source_port, destination, destination_port, state });
  }
}

/** Cuts text into lines as it comes. A line that never ends is given up, and handed out cut. */
export class Splitter {
  #rest = "";

  push(text: string, line: (line: string) => void): void {
    const all = this.#rest === "" ? text : this.#rest + text;
    let from = 0;
    for (let end = all.indexOf("\n"); end >= 0; end = all.indexOf("\n", from)) {
      line(all.slice(from, end));
      from = end + 1;
    }
    this.#rest = all.slice(from);
    if (this.#rest.length > LONGEST) this.end(line);
  }

  end(line: (line: string) => void): void {
    if (this.#rest !== "") line(this.#rest);
    this.#rest = "";
  }
}
/** What is from there to the next space. */
function textAt(line: string, from: number): string {
  const end = line.indexOf(" ", from);
  return line.slice(from, end < 0 ? line.length : end);
}

function portOf(line: string, from: number, to: number): number | undefined {
  const at = line.indexOf(" sport=", from);
  const text = at < 0 || at >= to ? "" : textAt(line, at + " sport=".length);
  return /^\d{1,5}$/.test(text) && Number(text) < 65536 ? Number(text) : undefined;
}

/** Undefined where it is no address. The program writes IPv4 as it is, and IPv6 nearly so. */
function canonical(address: string): string | undefined {
  const family = isIP(address);
  if (family === 0 || address.includes("%")) return undefined;
  return family === 4 ? address : ipaddr.parse(address).toString();
}
