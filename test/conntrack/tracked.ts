/** What the tests against the kernel share: a listener that can be waited for, connections, and the rules they need. */
import assert from "node:assert/strict";
import { once } from "node:events";
import { connect, createServer, type Socket } from "node:net";
import process from "node:process";
import type { TestContext } from "node:test";
import { getLogger } from "@logtape/logtape";
import { execaSync } from "execa";
import type { Flow, FlowKind } from "../../main.ts";
import { WatchedAddresses } from "../../plugins/conntrack/addresses.ts";
import type { ConntrackListener, ConntrackSource } from "../../plugins/conntrack/flow.ts";
import { NetlinkSource } from "../../plugins/conntrack/netlink.ts";
import { ProgramSource } from "../../plugins/conntrack/program.ts";
import { deadline } from "../../plugins/shared/async.ts";
import { processes } from "../../plugins/shared/proc.ts";
import { cleanup } from "../helpers.ts";

export const log = getLogger(["dormouse", "test"]);
export const V4 = "127.0.0.7", V6 = "::1";
export const watched = new WatchedAddresses([V4, V6]);
export const RULES = `
table inet track {
  chain out {
    type filter hook output priority 0
    ct state new counter accept
  }
}
table ip publish {
  chain out {
    type nat hook output priority -100
    tcp dport 9000 dnat to ${V4}:8000
  }
}`;

type Said = { at: "connected" } | { at: "lost"; reason: string } | { at: FlowKind; flow: Flow };

/** Keeps what it is told, and lets a test wait for more. */
export class Heard implements ConntrackListener {
  readonly all: Said[] = [];
  #next = Promise.withResolvers<void>();
  event(kind: FlowKind, flow: Flow): void {
    this.#add({ at: kind, flow });
  }
  lost(reason: string): void {
    this.#add({ at: "lost", reason });
  }
  connected(): void {
    this.#add({ at: "connected" });
  }
  /** The first that it is so of, from the `from`th on. */
  async first(what: string, is: (said: Said) => boolean, from = 0): Promise<Said> {
    const find = async () => {
      for (let said;; await this.#next.promise) if ((said = this.all.slice(from).find(is))) return said;
    };
    return await deadline(find(), 20_000, `waiting for ${what}`);
  }
  #add(said: Said): void {
    this.all.push(said);
    this.#next.resolve();
    this.#next = Promise.withResolvers();
  }
}

export async function started(
  t: TestContext,
  kind: ConntrackSource["name"],
  options: { receiveBuffer?: number; listener?: Heard } = {},
): Promise<{ source: ConntrackSource; heard: Heard }> {
  const { receiveBuffer, listener: heard = new Heard() } = options;
  const source = kind === "program"
    ? new ProgramSource({ log, watched })
    : new NetlinkSource({ log, watched, ...(receiveBuffer && { receiveBuffer }) });
  cleanup(t).defer(() => source.close());
  source.start(heard);
  assert.equal(heard.all.length, 0, "nothing is told before start() returns");
  await heard.first("connected", ({ at }) => at === "connected");
  return { source, heard };
}

interface Connection {
  socket: Socket;
  /** Both ports, as the kernel will tell: of a client alone, one comes again sooner or later. */
  source_port: number;
  destination_port: number;
}

/** A connection that stays open until the test ends; `dial` where the server is published elsewhere. */
export async function connected(t: TestContext, host: string, port = 0, dial = { host, port }): Promise<Connection> {
  const server = createServer((socket) => socket.on("error", () => socket.destroy()));
  server.listen(port, host);
  await once(server, "listening");
  const { port: destination_port } = server.address() as { port: number };
  const socket = connect({ ...dial, port: dial.port || destination_port });
  cleanup(t).defer(() => {
    socket.destroy();
    server.close();
  });
  await once(socket, "connect");
  return { socket, source_port: socket.localPort!, destination_port };
}

export const same = (connection: Connection) => (flow: Flow) =>
  flow.source_port === connection.source_port && flow.destination_port === connection.destination_port;
export const isOf = (connection: Connection, state?: string) => (said: Said) =>
  "flow" in said && same(connection)(said.flow) && (state === undefined || said.flow.state === state);

/** Sends a datagram to each of so many ports: a flow each. Nothing else in this process runs meanwhile. */
export function burst(count: number): void {
  const script = `for ((i = 0; i < ${count}; i++)); do echo x > /dev/udp/${V4}/$((10000 + i)); done`;
  execaSync("bash", ["-c", script], { timeout: 300_000, stdin: "ignore" });
}

/** Of this process. */
export function children() {
  return processes().filter(({ parent, state }) => parent === process.pid && state !== "Z")
    .map(({ pid }) => ({ pid, name: execaSync("cat", [`/proc/${pid}/comm`], { reject: false }).stdout }));
}
