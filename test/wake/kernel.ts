// Run by mod.test.ts in a network of its own: the real kernel, the real network and process driver.
import assert from "node:assert/strict";
import { existsSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { test, type TestContext } from "node:test";
import type { Driver, Hypervisor, LifecycleEvent, Plugin, RunningHost, Wake } from "../../main.ts";
import hypervisorPlugin from "../../plugins/hypervisor/mod.ts";
import networkPlugin from "../../plugins/network/mod.ts";
import processPlugin from "../../plugins/process/mod.ts";
import { dialProbe } from "../../plugins/shared/probe-ports.ts";
import { run } from "../../plugins/shared/run.ts";
import storePlugin from "../../plugins/store.ts";
import wakePlugin from "../../plugins/wake/mod.ts";
import {
  capturedLogs,
  cleanup,
  freePort,
  lacking,
  runMain,
  RUNTIME,
  startWith,
  temporaryFolder,
  until,
} from "../helpers.ts";
import { configIn, greet, greetFrom } from "../network/world.ts";
import { type Table, tablePlugin } from "./table.ts";
import { open, rest } from "./world.ts";

const BRIDGE = "dmtest0"; // as configIn() has it
const ORIGIN = { actor: "test", cause: "request" };
const GUEST = 8080;
const GREETER = join(import.meta.dirname!, "..", "network", "greeter.ts");

/** What keeps a test of IPv6 from being one. */
const skip6 = lacking(existsSync("/proc/net/if_inet6") ? null : "the kernel has no IPv6");

interface World {
  host: RunningHost;
  hypervisor: Hypervisor;
  driver: Driver;
  wake: Wake;
  table: Table;
  events: LifecycleEvent[];
  /** A running instance that greets who connects, with its port published; on IPv6 too where `address` is `::`. */
  make(name: string, address?: string): Promise<{ id: string; ip: string; ip6: string; port: number }>;
}

/** `queues` says whether the driver is one whose sleeping instances' kernel still takes connections. */
async function worldOf(t: TestContext, { folder = temporaryFolder(t), queues = true } = {}): Promise<World> {
  const { plugin, table } = tablePlugin();
  const events: LifecycleEvent[] = [];
  const reader: Plugin = {
    name: "reader",
    requires: ["hypervisor"],
    setup(host) {
      const [driver] = host.use("hypervisor").drivers();
      // A frozen process is one that does; without, it stands for a machine that is gone.
      (driver.features as Set<string>)[queues ? "add" : "delete"]("queues");
      host.hooks.on("instance:event", (event) => void events.push(event), { buffer: 10_000 });
    },
  };
  const plugins = [storePlugin, networkPlugin, hypervisorPlugin, processPlugin, plugin, reader, wakePlugin] as Plugin[];
  const tables = { network: { bridge: BRIDGE, subnet: "10.89.7.0/24" }, process: { grace: "100ms" } };
  const host = await startWith(t, plugins, { folder, tables });
  const hypervisor = host.use("hypervisor");
  // Instances outlive their host: the last one of a test removes what all of them made.
  cleanup(t).defer(async () => {
    for (const { id } of hypervisor.list()) {
      await hypervisor.delete(id, ORIGIN).catch((error) => assert.equal(error.code, "shutting_down"));
    }
  });
  await until("it listens", () => table.conntrack.error === null);
  const make = async (name: string, address = "0.0.0.0") => {
    const port = await freePort();
    const wake = { ports: [{ host_port: port, guest_port: GUEST }] };
    const cmd = [...RUNTIME, GREETER, String(GUEST), address];
    const { id, network } = await hypervisor.create({ name, image: "host", cmd, wake }, ORIGIN);
    await until("the kernel forwards its port", async () => (await forwarded()).includes(port));
    if (!skip6) {
      const by6 = async () => (await forwarded("ip6")).includes(port);
      // That is tried once, for a second, each time that it starts.
      if (address === "::" && !await by6()) {
        console.log(`seen: the port of ${name} did not answer by IPv6 within a second`);
        await hypervisor.stop(id, ORIGIN);
        await hypervisor.start(id, ORIGIN);
        await until("the kernel forwards its port again", async () => (await forwarded()).includes(port));
      }
      assert.equal(await by6(), address === "::");
    }
    return { id, ip: network.ip!, ip6: network.ip6!, port };
  };
  return { host, hypervisor, driver: hypervisor.drivers()[0], wake: host.use("wake"), table, events, make };
}

/** Puts it to sleep once every connection of before is over: one that its program has not closed yet rightly wakes it. */
async function asleep(hypervisor: Hypervisor, id: string): Promise<void> {
  // What the kernel tells late, of a connection from before, may call it back half-way: then it has not slept.
  for (let again = true; again;) {
    await quiet(hypervisor, id);
    again = await hypervisor.standby(id, ORIGIN).then(() => false, (error) => {
      if (error.code !== "aborted") throw error;
      return true;
    });
  }
}

async function quiet(hypervisor: Hypervisor, id: string): Promise<void> {
  const { ip, ip6 } = hypervisor.find(id)!.network;
  await until("its connections are over", async () => {
    const tables = [["ipv4", ip], ["ipv6", skip6 ? null : ip6]].filter(([, address]) => address) as [string, string][];
    const listed = await Promise.all(
      tables.map(([family, address]) => run("conntrack", ["-L", "-p", "tcp", "-f", family, "--reply-src", address])),
    );
    return listed.join("\n").split("\n").every((line) => line === "" || /\b(TIME_WAIT|CLOSE|NONE)\b/.test(line));
  });
}

/** The host ports that the kernel forwards. */
async function forwarded(family: "ip" | "ip6" = "ip"): Promise<number[]> {
  const text = await run("nft", ["-j", "list", "map", family, `dormouse_wake_${BRIDGE}`, "wake"]);
  const { nftables } = JSON.parse(text) as { nftables: { map?: { elem?: [number, unknown][] } }[] };
  return nftables.flatMap(({ map }) => map?.elem?.map(([port]) => port) ?? []);
}

/** A namespace beyond the host's own networks, with what it sees of the host. */
async function outside(
  t: TestContext,
): Promise<Record<"namespace" | "host" | "address" | "host6" | "address6", string>> {
  await run("ip", ["-batch", "-"], {
    input: [
      "netns add world",
      "link add name world0 type veth peer name eth0 netns world",
      "addr add 198.51.100.1/24 dev world0",
      ...(skip6 ? [] : ["addr add fd51::1/64 dev world0 nodad"]),
      "link set dev world0 up",
    ].join("\n"),
  });
  cleanup(t).defer(() => run("ip", ["netns", "delete", "world"]).then(() => {}));
  cleanup(t).defer(() => run("ip", ["link", "delete", "dev", "world0"]).then(() => {}));
  const within = [
    "addr add 198.51.100.2/24 dev eth0",
    ...(skip6 ? [] : ["addr add fd51::2/64 dev eth0 nodad"]),
    "link set dev eth0 up",
    "route add default via 198.51.100.1",
    ...(skip6 ? [] : ["route add default via fd51::1"]),
  ];
  await run("ip", ["-n", "world", "-batch", "-"], { input: within.join("\n") });
  return { namespace: "world", host: "198.51.100.1", address: "198.51.100.2", host6: "fd51::1", address6: "fd51::2" };
}

test("awake, the kernel forwards a port for everyone, and the instance sees the client's address", async (t) => {
  const { make, wake } = await worldOf(t);
  const [a, b] = [await make("a"), await make("b")];
  const world = await outside(t);
  assert.equal(await greetFrom(world.namespace, world.host, a.port), `hello ${world.address}`);
  assert.equal(await greet("127.0.0.1", a.port), "hello 10.89.7.1");
  assert.equal(await greet("198.51.100.1", a.port), "hello 198.51.100.1", "from the host's own address");
  assert.equal(wake.stats().connections, 0, "no byte passed through this process");
  // What no rule can serve on every machine, the listener takes.
  assert.equal(await greetFrom(`${BRIDGE}-${b.id}`, "10.89.7.1", a.port), "hello 10.89.7.1", "from another instance");
  assert.equal(await greetFrom(`${BRIDGE}-${a.id}`, "10.89.7.1", a.port), "hello 10.89.7.1", "from itself");
  assert.equal(await greet("::1", a.port), "hello 10.89.7.1", "by IPv6, which the instance has no address of");
  assert.equal(wake.stats().connections, 3);
});

test("an instance does not reach a port of 127.0.0.1, though the bridge may route it", async (t) => {
  const { make } = await worldOf(t);
  const [a, b] = [await make("a"), await make("b")];
  await run("nft", ["flush", "chain", "inet", `dormouse_net_${BRIDGE}`, "guard"]); // ours is enough
  const script = [
    "echo 1 > /proc/sys/net/ipv4/conf/eth0/route_localnet",
    "ip link set dev lo down",
    "ip route flush table local dev lo",
    "ip route add 127.0.0.1/32 via 10.89.7.1 dev eth0 src " + b.ip,
  ].join(" && ");
  await run("ip", ["netns", "exec", `${BRIDGE}-${b.id}`, "sh", "-c", script]);
  assert.equal(await greetFrom(`${BRIDGE}-${b.id}`, "127.0.0.1", a.port, 2), null);
});

test("by IPv6, a port is forwarded and a frozen instance woken likewise", { skip: skip6 }, async (t) => {
  const { make, hypervisor, wake, events } = await worldOf(t);
  const { id, ip6, port } = await make("web", "::");
  const world = await outside(t);
  const fromOutside = () => greetFrom(world.namespace, world.host6, port);
  assert.equal(await fromOutside(), `hello ${world.address6}`);
  assert.match(await greet(world.host6, port), /^hello /, "from the host");
  assert.equal(wake.stats().connections, 0, "no byte passed through this process");
  assert.match(await greet("::1", port), /^hello /);
  assert.equal(wake.stats().connections, 1);
  for (const connect of [fromOutside, () => greet(ip6, GUEST)]) {
    await asleep(hypervisor, id);
    assert.match(String(await connect()), /^hello /);
  }
  assert.equal(events.filter(({ action, cause }) => action === "restore" && cause === "connection").length, 2);
  // Nobody listens on IPv6 there: what takes both leads to IPv4.
  const four = await make("four");
  assert.match(String(await greetFrom(world.namespace, world.host6, four.port)), /^hello /);
});

// Point 5: the handshake is answered by the sleeping instance's own kernel.
test("a frozen instance is woken by a connection, and no byte passes through the host process", async (t) => {
  const { make, hypervisor, wake, events } = await worldOf(t);
  const { id, ip, port } = await make("web");
  const world = await outside(t);
  const other = await make("other");
  const ways: [string, () => Promise<string | null>][] = [
    ["its published port", () => greet("127.0.0.1", port)],
    ["its published port from outside", () => greetFrom(world.namespace, world.host, port)],
    ["its own address", () => greet(ip, GUEST)],
    ["its own address from another instance", () => greetFrom(`${BRIDGE}-${other.id}`, ip, GUEST)],
  ];
  for (const [what, connect] of ways) {
    await asleep(hypervisor, id);
    assert.ok((await forwarded()).includes(port), "the element stays");
    assert.match(String(await connect()), /^hello /, what);
  }
  const restores = events.filter(({ action }) => action === "restore").map(({ actor, cause }) => `${actor} ${cause}`);
  // One more where the kernel told late of a connection from before.
  assert.ok([0, 1].includes(restores.length - ways.length), String(restores));
  assert.deepEqual(new Set(restores), new Set(["wake connection"]));
  assert.equal(wake.stats().connections, 0);
});

// W2, W3.
test("50 first connections to a frozen instance are answered after one restore", async (t) => {
  const { make, hypervisor, events } = await worldOf(t);
  const { id, port } = await make("web");
  await asleep(hypervisor, id);
  const answers = await Promise.all(Array.from({ length: 50 }, () => greet("127.0.0.1", port)));
  assert.deepEqual(new Set(answers), new Set(["hello 10.89.7.1"]));
  assert.equal(events.filter(({ action }) => action === "restore").length, 1);
});

// I16: what we do ourselves to find out whether it answers is nobody knocking.
test("a probe does not wake, a connection beside it does", async (t) => {
  const { make, hypervisor, table } = await worldOf(t);
  const { id, ip } = await make("web");
  await asleep(hypervisor, id);
  const seen = new Promise((resolve) => table.conntrack.watch(ip, resolve));
  (await dialProbe(ip, GUEST)).destroy();
  await seen;
  assert.equal(hypervisor.find(id)?.state, "Standby");
  assert.match(await greet(ip, GUEST), /^hello/);
});

// R1: the way is changed before the instance stops to serve.
test("the port of an instance that will be gone falls to the listener before its standby, and returns after", async (t) => {
  const { make, hypervisor, driver, wake } = await worldOf(t, { queues: false });
  const { id, port } = await make("web");
  const order: number[][] = [];
  for (const method of ["standby", "stop"] as const) {
    const original = driver[method]!.bind(driver) as (...args: unknown[]) => Promise<never>;
    driver[method] = async (...args: unknown[]) => (order.push(await forwarded()), await original(...args));
  }
  await asleep(hypervisor, id);
  assert.deepEqual(order, [[]]);
  const answers = await Promise.all(Array.from({ length: 20 }, () => greet("127.0.0.1", port)));
  assert.deepEqual(new Set(answers), new Set(["hello 10.89.7.1"]));
  const passed = wake.stats().connections;
  assert.equal(passed, 20);
  await until("the kernel forwards it again", async () => (await forwarded()).includes(port));
  assert.match(await greet("127.0.0.1", port), /^hello/);
  assert.equal(wake.stats().connections, passed);
  await hypervisor.stop(id, ORIGIN);
  assert.deepEqual(order, [[], []]);
});

test("the port returns to the kernel when the standby comes to nothing", async (t) => {
  const { make, hypervisor, driver, host } = await worldOf(t, { queues: false });
  const { id, port } = await make("web");
  driver.standby = () => Promise.reject(new Error("no"));
  await assert.rejects(hypervisor.standby(id, ORIGIN), /no/);
  await until("it failed", async () => (await forwarded()).includes(port));
  // Overtaken within the guards, so that no event tells of it.
  const arrived = Promise.withResolvers<number[]>();
  const guard = host.hooks.guard("before:standby", () => {
    forwarded().then(arrived.resolve, arrived.reject);
    return new Promise(() => {});
  }, { priority: Number.MIN_SAFE_INTEGER, timeout: 3_000 });
  const failed = assert.rejects(hypervisor.standby(id, ORIGIN), /deadline/);
  assert.deepEqual(await arrived.promise, []);
  await failed;
  await until("a guard after ours failed", async () => (await forwarded()).includes(port));
  guard[Symbol.dispose]();
});

// R2, R5, R7, R8: whatever it meets.
for (const queues of [true, false]) {
  const kind = queues ? "is frozen" : "would be gone";
  test(`200 sleeps strand and refuse no connection when the instance ${kind}`, async (t) => {
    const { make, hypervisor } = await worldOf(t, { queues });
    const { id, port } = await make("web");
    for (let cycle = 0; cycle < 200; cycle++) {
      const sleep = hypervisor.standby(id, ORIGIN).catch((error) => assert.equal(error.code, "aborted"));
      await new Promise((resolve) => setTimeout(resolve, cycle % 20));
      assert.match(await greet("127.0.0.1", port), /^hello/, `cycle ${cycle}`);
      await sleep;
    }
  });
}

// I3, I5: what was missed is found in the table.
test("a connection whose events were lost wakes with the resync", async (t) => {
  const logs = capturedLogs(t);
  const { make, hypervisor, table } = await worldOf(t);
  const { id, port } = await make("web");
  // From before its sleep on: what is told late of a connection from before has the table looked at.
  table.deaf = true;
  await asleep(hypervisor, id);
  const client = await open(t, port);
  assert.equal(hypervisor.find(id)?.state, "Standby");
  table.failures = 1;
  table.reconnect();
  assert.match(await rest(client), /^hello/);
  assert.equal(logs.filter((line) => line.includes("Cannot read the table of connections")).length, 1);
});

// R3: the client waits in the instance's kernel while there is no host at all.
test("a connection that came while the host was down wakes when it is up again", async (t) => {
  const folder = temporaryFolder(t);
  const first = await worldOf(t, { folder });
  const { id, port } = await first.make("web");
  await first.hypervisor.standby(id, ORIGIN);
  await first.host.close();
  const client = await open(t, port);
  const second = await worldOf(t, { folder });
  assert.match(await rest(client), /^hello/);
  assert.equal(second.hypervisor.find(id)?.state, "Running");
  await until("the kernel forwards its port again", async () => (await forwarded()).includes(port));
});

test("a wake that failed is tried again for a connection that still waits", async (t) => {
  const { make, hypervisor, driver } = await worldOf(t);
  const { id, port } = await make("web");
  await asleep(hypervisor, id);
  const restore = driver.restore!.bind(driver);
  let failed = 0;
  driver.restore = async (...args) => {
    if (failed++ < 1) throw new Error("not yet");
    return await restore(...args);
  };
  assert.match(await rest(await open(t, port)), /^hello/);
  assert.equal(failed, 2);
});

test("purge-wake leaves no rule behind", async (t) => {
  const folder = temporaryFolder(t);
  const { host, make } = await worldOf(t, { folder });
  const { port } = await make("web");
  assert.deepEqual(await forwarded(), [port]);
  await host.close();
  assert.deepEqual(await forwarded(), [port], "instances run on, and so do their ports");
  const file = configIn(folder);
  writeFileSync(file, `${await run("cat", [file])}\n[plugins.hypervisor]\n[plugins.wake]\n`);
  const { exitCode, stderr } = await runMain(t, ["--config", file, "--purge-wake"]);
  assert.equal(exitCode, 0, String(stderr));
  assert.doesNotMatch(await run("nft", ["list", "tables"]), /dormouse_wake/);
  assert.equal(await run("cat", [`/proc/sys/net/ipv4/conf/${BRIDGE}/route_localnet`]), "0");
  await worldOf(t, { folder }); // which removes the instance that runs on
});
