/**
 * The plugin `wake`: brings instances back when a connection arrives. `policy.ts` is what an instance may ask for and
 * `claims.ts` whose ports and hosts are whose; `paths.ts` decides where a published port leads, by the kernel's map
 * (`elements.ts`, `rules.ts`) or to our listeners (`listeners.ts`, `proxy.ts`, `splice.ts`); `http.ts` and `headers.ts`
 * route by Host. All of them pass the `gate.ts`, which holds a connection (`holding.ts`) until the `waker.ts` has woken
 * the instance and its port answers (`readiness.ts`). `direct.ts` wakes those whose kernel took the connection itself.
 */
import { definePlugin, type Instance, type LifecycleEvent } from "../../main.ts";
import { Reach } from "../shared/reach.ts";
import { about } from "../shared/schemas.ts";
import { Claims } from "./claims.ts";
import { Direct } from "./direct.ts";
import { Elements } from "./elements.ts";
import { Gate } from "./gate.ts";
import { Router } from "./http.ts";
import { Listeners } from "./listeners.ts";
import { parseAddress, WakeOptions } from "./options.ts";
import { Paths } from "./paths.ts";
import { forked, type Means, normalise, policyOf, refuseEndlessSleep, WakePolicy } from "./policy.ts";
import { Proxy } from "./proxy.ts";
import { Readiness } from "./readiness.ts";
import { Waker } from "./waker.ts";

/** After all other guards, so that an instance which one of them keeps awake has lost nothing. */
const LAST = Number.MIN_SAFE_INTEGER;

export default definePlugin<WakeOptions>({
  name: "wake",
  requires: ["store", "hypervisor", "network?", "conntrack?"],
  provides: ["wake"],
  options: WakeOptions,
  commands: {
    "purge-wake": {
      help: "removes the rules of published ports of this config, then exits; run it before --purge-network",
      async run(host) {
        const network = host.find("network");
        if (!network?.enabled) throw new Error(`Cannot purge the rules: ${network?.reason ?? "there is no network"}`);
        await Elements.purge(network.bridge);
        host.log.info("Removed the rules of published ports of {bridge}", { bridge: network.bridge });
      },
    },
  },
  setup(host, options) {
    const { hooks, log, signal: closing } = host;
    const hypervisor = host.use("hypervisor");
    const conntrack = host.find("conntrack");
    const network = host.find("network")?.enabled ? host.find("network") : undefined;
    const find = (id: string) => hypervisor.find(id);
    const means = (): Means => ({
      http: options.http_listen !== undefined,
      health: host.plugins.has("health"),
      network: network !== undefined,
      reaches: (instance) => reach.has(instance),
      conntrack: conntrack !== undefined,
    });
    const reach = new Reach(hypervisor, network);
    const addressOf = (instance: Instance) => reach.addressOf(instance);
    // One that never listened may never do: then connections are better held here than there, where nobody sees them.
    let listened = false;
    const listens = () => listened ||= conntrack?.error === null;
    const queues = (instance: Instance) => {
      if (!listens() || addressOf(instance) === null || !policyOf(instance).enabled) return false;
      return hypervisor.drivers().find(({ name }) => name === instance.driver)?.features.has("queues") ?? false;
    };
    const passes = (instance: Instance) => (signal: AbortSignal) => hooks.ask("wake:ready", { instance, signal });

    const elements = network && new Elements({ bridge: network.bridge, bind: options.bind }, log, closing);
    if (!elements) log.warn("Published ports go through the host process: the network is off");

    const claims = new Claims(host.use("store"), find);
    const readiness = new Readiness();
    const paths = new Paths({ claims, elements, readiness, addressOf, queues, passes, find });
    const waker = new Waker({ hypervisor, hooks, startOnDemand: options.start_on_demand, leaving: paths.leaving });
    const bounds = { each: options.max_held_per_instance, total: options.max_held };
    const gate = new Gate({ hypervisor, paths, readiness, waker, bounds, addressOf, closing });
    const proxy = new Proxy(claims, gate);
    const listeners = new Listeners({
      bind: options.bind,
      log,
      claimed: (port) => claims.port(port) !== undefined,
      accept: proxy.accept,
    });
    const direct = network && conntrack && new Direct({
      conntrack,
      hypervisor,
      paths,
      waker,
      gateways: [network.gateway, network.gateway6],
      log,
      closing,
    });
    const router = new Router({ claims, gate, proxy, hypervisor, log });
    let url: string | null = null;

    host.defer(() => readiness[Symbol.dispose]());
    host.defer(() => paths[Symbol.dispose]());
    host.defer(() => direct?.[Symbol.dispose]());
    // Those that are held end with the host's signal; these wait for what is under way. The kernel's map stays: the
    // instances run on, and so do their ports.
    host.defer(() => proxy[Symbol.asyncDispose]());
    host.defer(() => Promise.all([listeners, router].map((each) => each[Symbol.asyncDispose]())).then(() => {}));

    const extension = hypervisor.extend<WakePolicy>({
      field: "wake",
      code: "invalid_wake",
      schema: about("By which connections it wakes", WakePolicy),
      normalise(policy, instance) {
        const kept = normalise(policy, instance, means());
        claims.check({ ...instance, policies: { ...instance.policies, wake: kept } });
        return kept;
      },
      forked,
    });
    host.defer(() => extension[Symbol.dispose]());

    const notes = hypervisor.declareNotes({ "wake:done": { help: "An attempt to wake an instance, after it" } });
    host.defer(() => notes[Symbol.dispose]());
    hooks.on("wake:done", async ({ instance_id, name, cause, error, latency_ms }) => {
      // Whoever it was woken for is served first: a note is on disk before `note()` returns.
      await new Promise((resolve) => setImmediate(resolve));
      const ms = Math.round(latency_ms * 10) / 10;
      hypervisor.note(instance_id, {
        type: "wake:done",
        origin: { actor: "wake", cause },
        summary: error === null ? `"${name}" was woken in ${ms} ms` : `Cannot wake "${name}": ${error}`,
        detail: { error, latency_ms: ms },
      });
    }, { consumer: "wake-notes", buffer: 4096 });

    const admit = async (instance: Instance) => {
      refuseEndlessSleep(instance, means());
      for (const { host_port } of policyOf(instance).ports) await listeners.reserve(host_port);
    };
    hooks.guard("before:create", ({ instance }) => admit(instance));
    hooks.guard("before:update", ({ updated }) => updated && admit(updated));
    hooks.guard("before:standby", ({ instance }) => direct?.ask(instance), { priority: -LAST });
    hooks.guard("before:standby", async (context) => {
      await paths.leave(context, "standby");
      direct?.leave(context.instance);
    }, { priority: LAST });
    hooks.guard("before:stop", (context) => paths.leave(context, "stop"), { priority: LAST });
    hooks.commit("instance:commit", (context) => claims.commit(context));

    const follow = (event: LifecycleEvent) => {
      claims.follow(event);
      if (event.to === null || event.to === "Running") waker.reset(event.instance_id);
      paths.follow(event);
      direct?.follow(event);
      if (event.action !== "update" && event.to !== null && event.from !== null) return;
      const { ports } = policyOf(event.instance);
      for (const { host_port } of ports) if (claims.port(host_port)) listeners.open(host_port);
      listeners.sweep();
    };
    const begin = async () => {
      const instances = hypervisor.list();
      for (const conflict of claims.rebuild(instances)) {
        log.error("{reason}; the newer one goes without", { reason: conflict.message, error: conflict });
      }
      await paths.rebuild(instances);
      for (const { host_port } of claims.ports()) listeners.open(host_port);
      listeners.sweep();
      direct?.begin(instances);
    };
    let begun = false;
    const handle = (event: LifecycleEvent) => begun ? follow(event) : undefined;
    hooks.on("instance:event", handle, { buffer: 4096, lagged: () => begun ? begin() : undefined });

    // After the registry has found out what is awake, and before the API lets anybody change that.
    hooks.guard("host:ready", async () => {
      begun = true;
      await begin();
      const listen = options.http_listen && parseAddress(options.http_listen);
      if (!listen) return;
      const { address, family, port } = await router.listen(listen);
      url = `http://${family === "IPv6" ? `[${address}]` : address}:${port}`;
      log.info("HTTP routing on {url}", { url });
    }, { priority: 10, timeout: 60_000 });

    host.provide("wake", {
      stats: () => ({
        ...waker.counts,
        ...gate.counts,
        unknown_hosts: router.counts.unknown,
        held: gate.holding.total,
        piped: proxy.size,
      }),
      get url() {
        return url;
      },
    });
  },
});
