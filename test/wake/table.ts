import { once } from "node:events";
import { createInterface } from "node:readline";
import { execa } from "execa";
import type { Conntrack, Flow, FlowKind, Plugin } from "../../main.ts";
import { definePlugin } from "../../main.ts";
import { run } from "../../plugins/shared/run.ts";

type Listener = (kind: FlowKind, flow: Flow) => void;

const KINDS: Record<string, FlowKind> = { NEW: "new", UPDATE: "update", DESTROY: "destroy" };

/** The kernel's own table, as a service that a test can make deaf. */
export interface Table extends Conntrack {
  /** While true, events are dropped. */
  deaf: boolean;
  /** Makes the next dumps fail. */
  failures: number;
  /** As the source does after it lost events. */
  reconnect(): void;
}

export function tablePlugin(): { plugin: Plugin; table: Table } {
  const watches = new Map<string, Set<Listener>>();
  const followers = new Set<{ lost(reason: string): void; connected(): void }>();
  const undo = (undone: () => void): Disposable => ({ [Symbol.dispose]: undone });
  const table: Table = {
    mode: "program",
    error: null,
    deaf: false,
    failures: 0,
    watch(address, listener) {
      const listeners = watches.get(address) ?? new Set();
      watches.set(address, listeners.add(listener));
      return undo(() => void listeners.delete(listener));
    },
    follow(follower) {
      followers.add(follower);
      return undo(() => void followers.delete(follower));
    },
    async dump(addresses = new Set(watches.keys())) {
      if (table.failures-- > 0) throw new Error("no answer");
      const both = ["ipv4", "ipv6"].map((family) => run("conntrack", ["-L", "-p", "tcp", "-f", family]));
      const flows = (await Promise.all(both)).join("\n").split("\n").flatMap((line) => flowOf(line) ?? []);
      return flows.filter(({ destination }) => addresses.has(destination));
    },
    reconnect() {
      for (const { lost, connected } of [...followers]) lost("test"), connected();
    },
    stats: () => ({ events: 0, dropped: 0, malformed: 0, resyncs: 0 }),
  };
  const plugin = definePlugin({
    name: "table",
    provides: ["conntrack"],
    async setup(host) {
      const child = execa("conntrack", ["-E", "-p", "tcp", "-o", "id"], {
        buffer: false,
        reject: false,
        stdin: "ignore",
      });
      host.defer(async () => {
        child.kill("SIGKILL");
        await child;
      });
      createInterface({ input: child.stdout }).on("line", (line) => {
        const flow = table.deaf ? undefined : flowOf(line);
        const kind = KINDS[/\[(\w+)\]/.exec(line)?.[1] ?? ""];
        if (flow && kind) { for (const listener of watches.get(flow.destination) ?? []) listener(kind, flow); }
      });
      await once(child.nodeChildProcess ?? child, "spawn");
      host.provide("conntrack", table);
    },
  });
  return { plugin: plugin as Plugin, table };
}

function flowOf(line: string): Flow | undefined {
  const [, state = ""] = /tcp +6 +(?:\d+ +)?([A-Z_\d]+) src=/.exec(line) ?? [];
  const [, source, source_port] = /src=(\S+) dst=\S+ sport=(\d+)/.exec(line) ?? [];
  // Of the reply: behind a destination NAT, its source is the instance.
  const [, destination, destination_port] = /src=.* src=(\S+) dst=\S+ sport=(\d+)/.exec(line) ?? [];
  if (!destination) return undefined;
  const ports = { source_port: Number(source_port), destination_port: Number(destination_port) };
  return { protocol: "tcp", source, destination, state, ...ports };
}
