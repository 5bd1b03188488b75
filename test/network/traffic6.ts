// Run by mod.test.ts in a network of its own.
import assert from "node:assert/strict";
import { once } from "node:events";
import { readFileSync, writeFileSync } from "node:fs";
import { createServer, type Socket } from "node:net";
import { test, type TestContext } from "node:test";
import { DormouseError, type Instance } from "../../main.ts";
import hypervisorPlugin from "../../plugins/hypervisor/mod.ts";
import networkPlugin from "../../plugins/network/mod.ts";
import processPlugin from "../../plugins/process/mod.ts";
import { run } from "../../plugins/shared/run.ts";
import storePlugin from "../../plugins/store.ts";
import { capturedLogs, cleanup, startWith, temporaryFolder, until } from "../helpers.ts";
import { BRIDGE, GATEWAY, GATEWAY6, greet, greeterIn, greetFrom, reach, SUBNET, SUBNET6, worldOf } from "./world.ts";

const ORIGIN = { actor: "test", cause: "request" };
const SYSCTLS = "/proc/sys/net/ipv6/conf";

async function listen(t: TestContext, host: string, port: number): Promise<void> {
  const server = createServer((socket: Socket) => {
    socket.on("error", () => socket.destroy());
    socket.end(`hello ${socket.remoteAddress}`);
  });
  server.listen(port, host);
  await once(server, "listening");
  cleanup(t).defer(() => void server.close());
}

const ip = (...lines: string[]) => run("ip", ["-batch", "-"], { input: lines.join("\n") });
const flows = () => run("conntrack", ["-L", "-f", "ipv6", "-p", "tcp"]);
const inNamespace = (namespace: string, ...command: string[]) => run("ip", ["netns", "exec", namespace, ...command]);
const sysctl = (path: string) => readFileSync(`${SYSCTLS}/${path}`, "utf8").trim();
const noGuard = () => run("nft", ["flush", "chain", "inet", `dormouse_net_${BRIDGE}`, "guard"]);

/** The bridge's own. */
async function addressesOf(wanted: "global" | "link"): Promise<string[]> {
  const [link] = JSON.parse(await run("ip", ["-j", "-6", "addr", "show", "dev", BRIDGE]));
  const found: { scope: string; local: string; tentative?: boolean }[] = link?.addr_info ?? [];
  return found.filter(({ scope, tentative }) => scope === wanted && !tentative).map(({ local }) => local);
}

/** Another machine, in a namespace: 2001:db8:1::2, to which this one is 2001:db8:1::1. */
async function neighbour(t: TestContext): Promise<string> {
  await ip(
    "netns add world",
    "link add name world0 type veth peer name eth0 netns world",
    "addr add 2001:db8:1::1/64 dev world0 nodad",
    "link set dev world0 up",
  );
  cleanup(t).defer(async () => void await ip("link delete dev world0", "netns delete world"));
  const within = ["addr add 2001:db8:1::2/64 dev eth0 nodad", "link set dev eth0 up"];
  await run("ip", ["-n", "world", "-batch", "-"], { input: within.join("\n") });
  return "world";
}

// First, for the machine does not forward yet.
test("a machine that has its IPv6 by router advertisements keeps listening to them", async (t) => {
  await ip("link add name uplink0 type veth peer name uplink1", "link add name deaf0 type bridge");
  cleanup(t).defer(async () => void await ip("link delete dev uplink0", "link delete dev deaf0"));
  writeFileSync(`${SYSCTLS}/deaf0/accept_ra`, "0");
  assert.deepEqual([sysctl("all/forwarding"), sysctl("uplink0/accept_ra")], ["0", "1"]);
  await worldOf(t);
  const accepting = ["uplink0", "default", "deaf0", BRIDGE].map((device) => sysctl(`${device}/accept_ra`));
  assert.deepEqual([sysctl("all/forwarding"), ...accepting], ["1", "2", "2", "0", "0"]);
});

test("attach() connects host and instance over IPv6 at once, and conntrack sees it", async (t) => {
  const { network, instance } = await worldOf(t);
  assert.deepEqual([network.subnet6, network.gateway6], [SUBNET6, GATEWAY6]);
  const a = instance("a");
  assert.equal(a.network.ip6, "fdd0:18:a59:700::2");
  const { namespace } = await network.attach(a);
  assert.match(await reach(GATEWAY6, namespace), / 0% packet loss/);
  await greeterIn(t, namespace, 8001, "::");
  await listen(t, GATEWAY6, 8001);
  assert.equal(await greet(a.network.ip6!, 8001), `hello ${GATEWAY6}`);
  assert.equal(await greetFrom(namespace, GATEWAY6, 8001), `hello ${a.network.ip6}`);
  assert.match(await flows(), new RegExp(`src=${GATEWAY6} dst=${a.network.ip6} .*dport=8001`));
});

test("attach() lets instances reach each other over IPv6 through the host, where conntrack sees it", async (t) => {
  const { network, instance } = await worldOf(t);
  const [a, b] = [instance("a"), instance("b")];
  const [from, to] = await Promise.all([network.attach(a), network.attach(b)]);
  await greeterIn(t, to.namespace, 8002, "::");
  // More than once: a redirect that gets through would make the second one fail.
  for (let times = 0; times < 3; times++) {
    assert.equal(await greetFrom(from.namespace, b.network.ip6!, 8002), `hello ${a.network.ip6}`);
  }
  assert.match(await flows(), new RegExp(`src=${a.network.ip6} dst=${b.network.ip6} .*dport=8002`));
});

test("an instance reaches another network over IPv6 under the host's address", async (t) => {
  const { network, instance } = await worldOf(t);
  const { namespace } = await network.attach(instance("a"));
  await greeterIn(t, await neighbour(t), 8003, "::");
  assert.equal(await greetFrom(namespace, "2001:db8:1::2", 8003), "hello 2001:db8:1::1");
});

test("an instance sends nothing under an IPv6 address of another subnet, nor under a link-local one", async (t) => {
  const { network, instance } = await worldOf(t);
  const a = instance("a");
  const { namespace } = await network.attach(a);
  await ip(`route add 2001:db8:7::7/128 via ${a.network.ip6}`);
  await inNamespace(namespace, "ip", "addr", "add", "2001:db8:7::7/128", "dev", "eth0", "nodad");
  // For some time after it is there the kernel asks whether it is anybody else's.
  await until("its link-local address is its own", async () => (await addressesOf("link")).length === 1);
  const [linkLocal] = await addressesOf("link");
  const pings: [string, string][] = [["2001:db8:7::7", GATEWAY6], ["eth0", linkLocal]];
  const ping = ([from, to]: [string, string]) => inNamespace(namespace, "ping", "-c", "1", "-W", "1", "-I", from, to);
  await reach(GATEWAY6, namespace);
  for (const each of pings) await assert.rejects(ping(each), /100% packet loss|exit code 1/);
  await noGuard();
  for (const each of pings) assert.match(await ping(each), / 0% packet loss/, "without the guard, it would");
  await ip("route del 2001:db8:7::7/128");
});

test("an instance is nobody's router", async (t) => {
  const { network, instance } = await worldOf(t);
  await network.attach(instance("a"));
  assert.deepEqual([sysctl(`${BRIDGE}/accept_ra`), sysctl(`${BRIDGE}/forwarding`)], ["0", "1"]);
});

test("a restart with another subnet6 gives the bridge that one alone, and instances when they are attached", async (t) => {
  const first = await worldOf(t);
  const a = first.instance("a");
  await first.network.attach(a);
  await first.host.close();
  const addresses = () => addressesOf("global");
  const permanent = () => run("ip", ["-6", "neigh", "show", "dev", BRIDGE, "nud", "permanent"]);

  const second = await worldOf(t, first.folder, { subnet6: "fd12:3456::/48" });
  assert.deepEqual([second.network.subnet6, await addresses()], ["fd12:3456::/48", ["fd12:3456::1"]]);
  assert.equal(await permanent(), "", "neighbours of before are gone with it");
  const moved = second.instance("a");
  assert.deepEqual({ ...moved.network, ip6: null }, { ...a.network, ip6: null });
  await second.network.attach(moved);
  assert.match(await reach("fd12:3456::2"), / 0% packet loss/);
  assert.match(await permanent(), /^fd12:3456::2 lladdr 02:d0:0a:59:07:02/);
  await second.network.detach(moved);
  assert.equal(await permanent(), "");
  await second.host.close();

  for (const subnet6 of ["", false]) {
    const { network, instance, host } = await worldOf(t, first.folder, { subnet6 });
    assert.deepEqual([network.enabled, network.subnet6, network.gateway6, await addresses()], [true, null, null, []]);
    const b = instance("b");
    assert.equal(b.network.ip6, null);
    const { namespace } = await network.attach(b);
    assert.match(await reach(b.network.ip!), / 0% packet loss/);
    assert.doesNotMatch(await run("ip", ["-n", namespace, "-6", "addr"]), /fd/);
    await network.detach(b);
    await host.close();
  }
});

test("an instance whose row is older than IPv6 has none until its next start", async (t) => {
  const folder = temporaryFolder(t);
  const plugins = [storePlugin, networkPlugin, hypervisorPlugin, processPlugin];
  const start = (subnet6?: string) => {
    const table = { bridge: BRIDGE, subnet: SUBNET, ...(subnet6 !== undefined && { subnet6 }) };
    return startWith(t, plugins, { folder, tables: { network: table, process: { grace: "100ms" } } });
  };
  const old = await start("");
  const { id, network } = await old.use("hypervisor").create(
    { name: "a", image: "host", cmd: ["sleep", "600"] },
    ORIGIN,
  );
  assert.equal(network.ip6, null);
  old.use("store").db.exec("UPDATE instances SET body = json_remove(body, '$.network.ip6')");
  await old.close();

  const host = await start();
  const hypervisor = host.use("hypervisor");
  cleanup(t).defer(() => hypervisor.delete(id, ORIGIN));
  const found = hypervisor.find(id)!;
  assert.deepEqual([found.state, found.network], ["Running", network]);
  assert.deepEqual(hypervisor.present(found).network, { ...network, name: "default" });
  await host.use("network").attach(found);
  const inside = () => run("ip", ["-n", `${BRIDGE}-${id}`, "-6", "addr", "show", "dev", "eth0", "scope", "global"]);
  assert.equal(await inside(), "");
  assert.match(await reach(network.ip!), / 0% packet loss/);
  await hypervisor.stop(id, ORIGIN);
  const started = await hypervisor.start(id, ORIGIN);
  assert.deepEqual(started.network, { ...network, ip6: "fdd0:18:a59:700::2" } satisfies Instance["network"]);
  assert.match(await reach(started.network.ip6!), / 0% packet loss/);
});

test("the network refuses a subnet6 that overlaps a route", async (t) => {
  await ip("link add name lan0 type bridge", "link set dev lan0 up", "addr add fd77:4::1/64 dev lan0 nodad");
  await ip("route add 2000::/3 dev lan0", "route add unreachable fc00::/7", "route add fd78::/32 dev lan0 table 77");
  cleanup(t).defer(async () => {
    await ip("link delete dev lan0", "route del unreachable fc00::/7");
  });
  const cases: [string, RegExp][] = [
    ["fd77::/16", /Cannot use subnet "fd77::\/16": it overlaps the route fd77:4::\/64 dev lan0$/],
    ["fd77:4::/96", /overlaps the route fd77:4::\/64 dev lan0$/],
    ["fd78:0:0:1::/64", /overlaps the route fd78::\/32 dev lan0$/],
  ];
  for (const [subnet6, message] of cases) {
    await assert.rejects(
      worldOf(t, undefined, { subnet6 }),
      (error) => error instanceof DormouseError && error.code === "subnet_overlap" && message.test(error.message),
    );
  }
  const { network } = await worldOf(t, undefined, { subnet6: "2001:db8:5::/64" });
  assert.deepEqual([network.enabled, network.subnet6], [true, "2001:db8:5::/64"]);
});

test("the network goes on with IPv4 where the machine has no IPv6", async (t) => {
  const machines: [RegExp, () => unknown, () => unknown][] = [
    [
      /net\.ipv6\.conf\.all\.disable_ipv6 is 1$/,
      () => writeFileSync(`${SYSCTLS}/all/disable_ipv6`, "1"),
      () => writeFileSync(`${SYSCTLS}/all/disable_ipv6`, "0"),
    ],
    [
      /the kernel has none$/,
      () => run("mount", ["-t", "tmpfs", "none", "/proc/sys/net/ipv6"]),
      () => run("umount", ["/proc/sys/net/ipv6"]),
    ],
  ];
  for (const [reason, take, giveBack] of machines) {
    await take();
    try {
      const logs = capturedLogs(t);
      const { network, instance, host } = await worldOf(t);
      assert.deepEqual([network.enabled, network.subnet6, network.gateway6], [true, null, null]);
      assert.match(logs.join("\n"), /^info: Instances have no IPv6: /);
      assert.match(logs.join("\n"), reason);
      const a = instance("a");
      assert.deepEqual([a.network.ip, a.network.ip6], ["10.89.7.2", null]);
      const { namespace } = await network.attach(a);
      assert.match(await reach(GATEWAY, namespace), / 0% packet loss/);
      await network.detach(a);
      await host.close();
    } finally {
      await giveBack();
    }
  }
});
