import type { Conntrack, Flow, FlowKind, Host, Plugin } from "../../main.ts";
import { definePlugin } from "../../main.ts";
import conntrackPlugin from "../../plugins/conntrack/mod.ts";

/** What a test can do to the kernel's table of connections, which is else as it is. */
export interface Table {
  readonly conntrack: Conntrack;
  /** While true, events are lost. */
  deaf: boolean;
  /** So many of the next dumps fail. */
  failures: number;
  /** As the source does after it lost events. */
  reconnect(): void;
}

/** The real plugin, with a service that a test can make deaf. */
export function tablePlugin(): { plugin: Plugin; table: Table } {
  const followers = new Set<Parameters<Conntrack["follow"]>[0]>();
  let real: Conntrack;
  const table: Table = {
    get conntrack() {
      return real;
    },
    deaf: false,
    failures: 0,
    reconnect() {
      for (const follower of [...followers]) {
        follower.lost("test");
        follower.connected();
      }
    },
  };
  const service: Conntrack = {
    get mode() {
      return real.mode;
    },
    get error() {
      return real.error;
    },
    watch: (address, listener) =>
      real.watch(address, (kind: FlowKind, flow: Flow) => table.deaf ? undefined : listener(kind, flow)),
    follow(follower) {
      followers.add(follower);
      const following = real.follow(follower);
      return { [Symbol.dispose]: () => (followers.delete(follower), following[Symbol.dispose]()) };
    },
    async dump(addresses) {
      if (table.failures-- > 0) throw new Error("no answer");
      return await real.dump(addresses);
    },
    stats: () => real.stats(),
  };
  const { provides, options } = conntrackPlugin;
  const plugin = definePlugin({
    name: "conntrack",
    provides,
    options,
    setup(host, given) {
      const provide = ((name, implementation) => {
        real = implementation as Conntrack;
        host.provide(name, service as never);
      }) as Host["provide"];
      return conntrackPlugin.setup({ ...host, provide }, given as never);
    },
  });
  return { plugin: plugin as Plugin, table };
}
