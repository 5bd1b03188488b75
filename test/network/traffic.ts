// Run by mod.test.ts in a network of its own.
import assert from "node:assert/strict";
import { createSocket, type Socket as Datagrams } from "node:dgram";
import { once } from "node:events";
import { writeFileSync } from "node:fs";
import { createServer, type Socket } from "node:net";
import { test, type TestContext } from "node:test";
import { run } from "../../plugins/shared/run.ts";
import { cleanup } from "../helpers.ts";
import { BRIDGE, GATEWAY, greet, greeterIn, greetFrom, reach, worldOf } from "./world.ts";

/** A greeter in this process. */
async function listen(t: TestContext, host: string, port: number): Promise<void> {
  const server = createServer((socket: Socket) => {
    socket.on("error", () => socket.destroy());
    socket.end(`hello ${socket.remoteAddress}`);
  });
  server.listen(port, host);
  await once(server, "listening");
  cleanup(t).defer(() => void server.close());
}

async function datagrams(t: TestContext, address: string): Promise<Datagrams> {
  const socket = createSocket("udp4").bind(0, address);
  cleanup(t).defer(() => void socket.close());
  await once(socket, "listening");
  return socket;
}

/** Sends a listener its own address. */
function sending(socket: Datagrams): string {
  const { address, port } = socket.address();
  return `echo ${address} > /dev/udp/${address}/${port}`;
}

const flows = () => run("conntrack", ["-L", "-p", "tcp"]);
const inNamespace = (namespace: string, ...command: string[]) => run("ip", ["netns", "exec", namespace, ...command]);

test("attach() connects host and instance, and conntrack sees it", async (t) => {
  const { network, instance } = await worldOf(t);
  const a = instance("a");
  const { namespace, host_device } = await network.attach(a);
  assert.equal(namespace, `${BRIDGE}-a`);
  assert.equal(host_device, "dm-0a590702");
  await greeterIn(t, namespace, 8001);
  await listen(t, GATEWAY, 8001);
  assert.equal(await greet(a.network.ip!, 8001), `hello ${GATEWAY}`);
  assert.equal(await greetFrom(namespace, GATEWAY, 8001), `hello ${a.network.ip}`);
  assert.match(await reach(GATEWAY, namespace), / 0% packet loss/);
  assert.match(await inNamespace(namespace, "cat", "/sys/class/net/eth0/address"), /^02:d0:0a:59:07:02$/);
  assert.match(await flows(), new RegExp(`src=${GATEWAY} dst=${a.network.ip} .*dport=8001`));
});

test("attach() lets instances reach each other through the host, where conntrack sees it", async (t) => {
  const { network, instance } = await worldOf(t);
  const [a, b] = [instance("a"), instance("b")];
  const [from, to] = await Promise.all([network.attach(a), network.attach(b)]);
  await greeterIn(t, to.namespace, 8002);
  assert.equal(await greetFrom(from.namespace, b.network.ip!, 8002), `hello ${a.network.ip}`);
  assert.match(await flows(), new RegExp(`src=${a.network.ip} dst=${b.network.ip} .*dport=8002`));
});

test("an instance reaches another network under the host's address", async (t) => {
  const { network, instance } = await worldOf(t);
  const { namespace } = await network.attach(instance("a"));
  await run("ip", ["-batch", "-"], {
    input: [
      "netns add world",
      "link add name world0 type veth peer name eth0 netns world",
      "addr add 198.51.100.1/24 dev world0",
      "link set dev world0 up",
    ].join("\n"),
  });
  cleanup(t).defer(async () => {
    await run("ip", ["-batch", "-"], { input: "link delete dev world0\nnetns delete world" });
  });
  const within = ["addr add 198.51.100.2/24 dev eth0", "link set dev eth0 up"];
  await run("ip", ["-n", "world", "-batch", "-"], { input: within.join("\n") });
  await greeterIn(t, "world", 8003);
  assert.equal(await greetFrom(namespace, "198.51.100.2", 8003), "hello 198.51.100.1");
});

test("an instance reaches nothing that the host binds to 127.0.0.1, even with route_localnet", async (t) => {
  const { network, instance } = await worldOf(t);
  const { namespace } = await network.attach(instance("a"));
  const received: string[] = [];
  const [secret, open] = await Promise.all([datagrams(t, "127.0.0.1"), datagrams(t, GATEWAY)]);
  for (const socket of [secret, open]) socket.on("message", (text) => received.push(text.toString()));
  writeFileSync(`/proc/sys/net/ipv4/conf/${BRIDGE}/route_localnet`, "1");
  // As an instance would do that means harm: send packets for 127.0.0.1 out of its device.
  const script = [
    "echo 1 > /proc/sys/net/ipv4/conf/eth0/route_localnet",
    "ip link set dev lo down",
    "ip route flush table local dev lo",
    `ip route add 127.0.0.1/32 via ${GATEWAY} dev eth0 src 10.89.7.2`,
  ].join(" && ");
  await inNamespace(namespace, "sh", "-c", script);
  // What is sent first arrives first, so once the second is there the first never comes.
  const sendBoth = async () => {
    const second = once(open, "message");
    await inNamespace(namespace, "bash", "-c", [secret, open].map(sending).join("; "));
    await second;
    return received.splice(0);
  };
  assert.deepEqual(await sendBoth(), [`${GATEWAY}\n`]);
  await run("nft", ["flush", "chain", "inet", `dormouse_net_${BRIDGE}`, "guard"]);
  assert.deepEqual(await sendBoth(), ["127.0.0.1\n", `${GATEWAY}\n`], "without the guard, it would");
});

test("an instance sends nothing under an address of another subnet", async (t) => {
  const { network, instance } = await worldOf(t);
  const a = instance("a");
  const { namespace } = await network.attach(a);
  await run("ip", ["route", "add", "203.0.113.7/32", "via", a.network.ip!]);
  await inNamespace(namespace, "ip", "addr", "add", "203.0.113.7/32", "dev", "eth0");
  const ping = () => inNamespace(namespace, "ping", "-c", "1", "-W", "1", "-I", "203.0.113.7", GATEWAY);
  await assert.rejects(ping(), /100% packet loss|exit code 1/);
  await run("nft", ["flush", "chain", "inet", `dormouse_net_${BRIDGE}`, "guard"]);
  assert.match(await ping(), / 0% packet loss/, "without the guard, it would");
  await run("ip", ["route", "del", "203.0.113.7/32"]);
});
