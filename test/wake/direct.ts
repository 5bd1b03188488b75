/** The part of the plugin that wakes by the connection table, over a table that does as a test says and without nft. */
import { definePlugin, type Plugin } from "../../main.ts";
import { Claims } from "../../plugins/wake/claims.ts";
import { Direct } from "../../plugins/wake/direct.ts";
import { Paths } from "../../plugins/wake/paths.ts";
import { Readiness } from "../../plugins/wake/readiness.ts";
import type {} from "../../plugins/wake/mod.ts"; // the hooks that it declares
import { Waker } from "../../plugins/wake/waker.ts";

/** Joins the real parts as `plugins/wake/mod.ts` does where a driver's sleeping instances take connections themselves. */
export const directPlugin = definePlugin({
  name: "direct",
  requires: ["store", "hypervisor", "conntrack", "network"],
  setup(host) {
    const { hooks, log, signal: closing } = host;
    const [hypervisor, network] = [host.use("hypervisor"), host.use("network")];
    const find = (id: string) => hypervisor.find(id);
    const readiness = new Readiness();
    const paths = new Paths({
      claims: new Claims(host.use("store"), find),
      elements: undefined,
      readiness,
      addressOf: ({ network: { ip } }) => ip,
      queues: () => true,
      passes: () => () => Promise.resolve(),
      find,
    });
    const waker = new Waker({ hypervisor, hooks, startOnDemand: false, leaving: paths.leaving });
    const gateways = [network.gateway, network.gateway6];
    const direct = new Direct({ conntrack: host.use("conntrack"), hypervisor, paths, waker, gateways, log, closing });
    for (const part of [readiness, paths, direct]) host.defer(() => part[Symbol.dispose]());
    const last = { priority: Number.MIN_SAFE_INTEGER };
    hooks.guard("before:standby", ({ instance }) => direct.ask(instance), { priority: Number.MAX_SAFE_INTEGER });
    hooks.guard("before:standby", async (context) => {
      await paths.leave(context, "standby");
      direct.leave(context.instance);
    }, last);
    hooks.guard("before:stop", (context) => paths.leave(context, "stop"), last);
    hooks.on("instance:event", (event) => {
      if (event.to === null || event.to === "Running") waker.reset(event.instance_id);
      paths.follow(event);
      direct.follow(event);
    }, { buffer: 100_000 });
    hooks.guard("host:ready", () => direct.begin(hypervisor.list()));
  },
}) as Plugin;
