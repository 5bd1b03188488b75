// Run by mod.test.ts in a network of its own.
import assert from "node:assert/strict";
import { existsSync, readdirSync, rmSync, statSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { test, type TestContext } from "node:test";
import { execa } from "execa";
import { DormouseError, type Instance } from "../../main.ts";
import { devices } from "../../plugins/network/ip.ts";
import { run } from "../../plugins/shared/run.ts";
import { cleanup, runMain, RUNTIME, temporaryFolder, until } from "../helpers.ts";
import { BRIDGE, configIn, greet, greeterIn, reach, SUBNET, traces, worldOf } from "./world.ts";

const ip = (...lines: string[]) => run("ip", ["-batch", "-"], { input: lines.join("\n") });
const within = (namespace: string, ...lines: string[]) =>
  run("ip", ["-n", namespace, "-batch", "-"], { input: lines.join("\n") });
/** Both, or one where this machine has no IPv6. */
const addressesOf = ({ network: { ip, ip6 } }: Instance) => [ip!, ...(ip6 === null ? [] : [ip6])];
const coded = (code: string, message: RegExp) => (error: unknown) => {
  assert.ok(error instanceof DormouseError, String(error));
  assert.equal(error.code, code);
  assert.match(error.message, message);
  return true;
};

/** Removes it all after the test, so that the next one begins with nothing; what was said of that. */
async function purge(t: TestContext, folder: string): Promise<string> {
  const { exitCode, stderr } = await runMain(t, ["--config", configIn(folder), "--purge-network"]);
  assert.equal(exitCode, 0, stderr);
  return JSON.parse(stderr).properties.what;
}

test("attach() makes whole what a host left that died in the middle of it", async (t) => {
  const { network, instance } = await worldOf(t);
  const a = instance("a");
  const [namespace, device] = [`${BRIDGE}-a`, "dm-0a590702"];
  const halves: [string, () => Promise<unknown>][] = [
    ["nothing", () => network.detach(a)],
    ["a name that is no namespace", async () => {
      await network.detach(a);
      writeFileSync(`/run/netns/${namespace}`, "");
    }],
    ["a namespace without a veth", () => network.detach(a).then(() => ip(`netns add ${namespace}`))],
    ["a veth that is down and tied to nothing", () => ip(`link set dev ${device} nomaster down`)],
    ["a veth without address and route", () => within(namespace, "addr flush dev eth0", "link set dev eth0 down")],
    ["a namespace whose veth is gone", () => ip(`link delete dev ${device}`)],
    ["a veth whose namespace is gone", async () => {
      await ip(`netns delete ${namespace}`, "netns add elsewhere");
      // The kernel takes a deleted namespace apart a moment later, and the veth with it.
      await until("the veth is gone with its namespace", () => !devices().has(device));
      await ip(`link add name ${device} type veth peer name eth0 netns elsewhere`);
    }],
    ["a namespace, and a veth into another one", async () => {
      await ip(`link delete dev ${device}`, `link add name ${device} type veth peer name eth0 netns elsewhere`);
    }],
    ["everything", () => Promise.resolve()],
  ];
  for (const [what, leave] of halves) {
    await leave();
    const expected = { namespace, host_device: device };
    assert.deepEqual(await network.attach(a), expected, what);
    for (const address of addressesOf(a)) {
      assert.match(await reach(address), / 0% packet loss/, what);
    }
    assert.match(await run("ip", ["-d", "link", "show", "dev", device]), /isolated on/, what);
    assert.match(await run("ip", ["-n", namespace, "route"]), /default via 10\.89\.7\.1/, what);
  }
  await network.detach(a);
  await network.detach(a);
  await ip("netns delete elsewhere");
  assert.doesNotMatch(await traces(), /dm-|dmtest0-/);
  assert.equal(await run("ip", ["neigh", "show", "dev", BRIDGE, "nud", "permanent"]), "");
});

test("attachTap() makes a port that a user may open, keeps one that is open, and a purge takes it away", async (t) => {
  const { folder, host, network, instance } = await worldOf(t);
  const a = instance("a");
  const device = await network.attachTap(a, 65534);
  assert.equal(device, "dm-0a590702");
  const link = await run("ip", ["-d", "link", "show", "dev", device]);
  assert.match(link, new RegExp(`master ${BRIDGE} `));
  assert.match(link, /tun type tap .*user (nobody|65534)/);
  assert.match(link, /isolated on/);
  const neighbours = await run("ip", ["neigh", "show", "dev", BRIDGE, "nud", "permanent"]);
  assert.ok(neighbours.includes(`${a.network.ip} lladdr ${a.network.mac}`), neighbours);
  const index = /^\d+/.exec(link)![0];
  await ip(`link set dev ${device} nomaster down`);
  assert.equal(await network.attachTap(a, 65534), device);
  const again = await run("ip", ["-d", "link", "show", "dev", device]);
  assert.equal(/^\d+/.exec(again)![0], index, "it is the same device");
  assert.match(again, new RegExp(`master ${BRIDGE} `));
  await network.detach(a);
  await network.detach(a);
  assert.doesNotMatch(await traces(), /dm-/);
  await network.attachTap(a, 65534);
  await host.close();
  await purge(t, folder);
  assert.doesNotMatch(await traces(), /dm-|dmtest0/);
});

test("attach() and a restart work after a host that was killed at any moment of them", async (t) => {
  const folder = temporaryFolder(t);
  const config = configIn(folder);
  for (let round = 0; round < 4; round++) {
    const [command, ...flags] = RUNTIME;
    const script = join(import.meta.dirname!, "churn.ts");
    const child = execa(command, [...flags, script, config], { stdin: "ignore", reject: false, buffer: false });
    cleanup(t).defer(() => void child.kill("SIGKILL"));
    const enough = 1 + Math.floor(Math.random() * 12);
    let dots = 0;
    for await (const chunk of child.stdout) if ((dots += chunk.length) >= enough) break;
    child.kill("SIGKILL");
    await child;

    const { host, network, instance } = await worldOf(t, folder);
    assert.equal(network.enabled, true, network.reason ?? "");
    const instances = ["x", "y", "z"].map(instance);
    await Promise.all(instances.map((each) => network.attach(each)));
    for (const address of instances.flatMap(addressesOf)) {
      assert.match(await reach(address), / 0% packet loss/);
    }
    await host.close();
  }
  await purge(t, folder);
  assert.doesNotMatch(await traces(), /dm-|dmtest0/);
});

test("attach() and detach() of many at once leave each other alone", async (t) => {
  const { network, instance } = await worldOf(t);
  const instances = Array.from({ length: 12 }, (_, n) => instance(`many${n}`));
  await Promise.all(instances.map((each) => network.attach(each)));
  const [kept, ...others] = instances;
  await Promise.all([...others.map((each) => network.detach(each)), network.attach(kept)]);
  assert.match(await reach(kept.network.ip!), / 0% packet loss/);
  await network.detach(kept);
  assert.doesNotMatch(await traces(), /dm-|dmtest0-/);
});

test("a restart removes what has no row and makes again what is missing, under instances that run", async (t) => {
  const first = await worldOf(t);
  const [kept, gone, odd] = [first.instance("kept"), first.instance("gone"), first.instance("odd")];
  assert.equal(odd.network.ip, "10.89.7.4");
  const { namespace } = await first.network.attach(kept);
  await first.network.attach(gone);
  await greeterIn(t, namespace, 8001);
  await first.host.close();

  const inode = statSync(`/run/netns/${namespace}`).ino;
  assert.equal(await greet(kept.network.ip!, 8001), "hello 10.89.7.1", "closing the host cuts nobody");
  await ip(`link delete dev ${BRIDGE}`, "netns add other0-x", "link add name dm-ffffffff type bridge");
  await ip("link add name dm-0a590704 type bridge"); // which cannot be a port, and must not be in the way of the others
  await run("nft", ["delete", "table", "inet", `dormouse_net_${BRIDGE}`]);
  cleanup(t).defer(async () => void await ip("netns delete other0-x", "link delete dev dm-ffffffff"));

  // As though the host had died between the transaction that deletes an instance and the removal of its veth.
  const second = await worldOf(t, first.folder);
  assert.equal(second.network.enabled, true);
  assert.equal(statSync(`/run/netns/${namespace}`).ino, inode);
  assert.equal(await greet(kept.network.ip!, 8001), "hello 10.89.7.1", "the bridge is there again, and its port");
  second.host.use("store").transaction(() => second.network.release("gone"));
  await second.host.close();
  assert.ok(existsSync(`/run/netns/${BRIDGE}-gone`));

  await worldOf(t, first.folder);
  assert.deepEqual(readdirSync("/run/netns").sort(), [namespace, "other0-x"].sort());
  const left = await traces();
  assert.match(left, /^dm-0a590702/m);
  assert.doesNotMatch(left, /^dm-0a590703/m);
  assert.match(left, /^dm-ffffffff/m, "what only looks like ours stays");
  assert.match(left, /masquerade/);
  assert.equal(await greet(kept.network.ip!, 8001), "hello 10.89.7.1");
});

test("the network refuses a subnet that overlaps a route, and no other", async (t) => {
  await ip(
    "link add name lan0 type veth peer name lan1",
    "link set dev lan0 up",
    "link set dev lan1 up",
    "addr add 10.77.4.1/24 dev lan0",
  );
  await ip("route add 0.0.0.0/1 via 10.77.4.2", "route add 128.0.0.0/1 via 10.77.4.2");
  await ip("route add 10.78.0.0/16 via 10.77.4.3 table 77", "addr add 10.79.9.9/32 dev lan0");
  cleanup(t).defer(async () => void await ip("link delete dev lan0", "route flush table 77"));
  const cases: [string, RegExp][] = [
    ["10.77.0.0/16", /Cannot use subnet "10\.77\.0\.0\/16": it overlaps the route 10\.77\.4\.0\/24 dev lan0$/],
    ["10.77.4.64/26", /overlaps the route 10\.77\.4\.0\/24 dev lan0$/],
    ["10.78.1.0/24", /overlaps the route 10\.78\.0\.0\/16 via 10\.77\.4\.3 dev lan0$/],
    ["10.79.0.0/16", /overlaps the route 10\.79\.9\.9 dev lan0$/],
  ];
  const before = await traces();
  for (const [subnet, message] of cases) {
    await assert.rejects(worldOf(t, undefined, { subnet, bridge: "dmtest1" }), coded("subnet_overlap", message));
  }
  assert.equal(await traces(), before);
  const { network, host, folder } = await worldOf(t);
  assert.equal(network.enabled, true, network.reason ?? "");
  await host.close();
  await purge(t, folder);
});

test("the network refuses a bridge that is somebody else's, until nobody has it", async (t) => {
  await ip(
    "link add name lanbr type bridge",
    "addr add 10.66.0.1/24 dev lanbr",
    "link add name veth5 type veth peer name veth6",
  );
  const bridgeOf = (bridge: string) => ({ bridge, subnet: "10.67.0.0/24" });
  const refused = (what: RegExp) => coded("bridge_in_use", what);
  await assert.rejects(
    worldOf(t, undefined, bridgeOf("lanbr")),
    refused(/bridge "lanbr": it belongs to something else;/),
  );
  await assert.rejects(worldOf(t, undefined, bridgeOf("veth5")), refused(/and is no bridge/));
  await ip("link delete dev lanbr", "link delete dev veth5");

  const [first, other] = [await worldOf(t), temporaryFolder(t)];
  const a = first.instance("a");
  const belongsToFirst = new RegExp(`belongs to the host with data_dir "${first.folder}/data"`);
  const purging = () => runMain(t, ["--config", configIn(other), "--purge-network"]);
  await assert.rejects(worldOf(t, other), refused(belongsToFirst), "it is up");
  await first.network.attach(a);
  await first.host.close();
  await assert.rejects(worldOf(t, other), refused(belongsToFirst), "its instances may run");
  assert.match((await purging()).stderr, belongsToFirst);

  const again = await worldOf(t, first.folder);
  await again.network.detach(a);
  await again.host.close();
  const second = await worldOf(t, other);
  assert.equal(second.network.enabled, true, "nobody is on it");
  await second.network.attach(second.instance("b"));
  await second.host.close();
  rmSync(join(other, "data"), { recursive: true });
  const third = await worldOf(t, first.folder);
  assert.equal(third.network.enabled, true, "the data_dir is gone");
  assert.doesNotMatch(await traces(), /dmtest0-b/);
  await third.host.close();
  await purge(t, first.folder);
});

test("--purge-network leaves no trace of ours, and everything of others", async (t) => {
  await ip("netns add other0-x", "link add name other0 type bridge", "link set dev other0 up");
  await run("nft", ["add", "table", "inet", "somebody"]);
  cleanup(t).defer(async () => void await ip("netns delete other0-x", "link delete dev other0"));
  cleanup(t).defer(async () => void await run("nft", ["delete", "table", "inet", "somebody"]));
  const before = await traces();
  const { network, instance, host, folder } = await worldOf(t);
  const a = instance("a");
  await network.attach(a);
  await network.attach(instance("b"));
  const running = await runMain(t, ["--config", configIn(folder), "--purge-network"]);
  assert.match(running.stderr, /store_locked/, "not while a host runs");
  await host.close();
  assert.notEqual(await traces(), before);
  assert.match(await purge(t, folder), new RegExp(`^link dm-\\w+, .*namespace ${BRIDGE}-a, .*link ${BRIDGE}$`));
  assert.equal(await traces(), before);
  assert.equal(await purge(t, folder), "there was nothing else");
  assert.equal(await traces(), before, "twice is once");

  const again = await worldOf(t, folder);
  assert.equal(again.network.subnet, SUBNET);
  assert.equal(again.instance("a").network.ip, a.network.ip, "the addresses stay reserved");
  await again.network.attach(a);
  assert.match(await reach(a.network.ip!), / 0% packet loss/);
  await again.host.close();
  await purge(t, folder);
});
