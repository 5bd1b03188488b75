import assert from "node:assert/strict";
import { once } from "node:events";
import { createServer } from "node:net";
import { test } from "node:test";
import * as v from "valibot";
import type { Plugin } from "../../main.ts";
import { DormouseError } from "../../main.ts";
import { cleanup, freePort, temporaryFolder } from "../helpers.ts";
import { ORIGIN } from "../hypervisor/scripted.ts";
import { Machines, talk, wakeWorld } from "./world.ts";

const coded = (code: string, message: RegExp) => (error: unknown) =>
  error instanceof DormouseError && error.code === code && message.test(error.message);
const body = (name: string, wake: unknown, more = {}) => ({ name, image: "x", env: { PORT: "0" }, wake, ...more });
const portsOf = (...ports: number[]) => ({ ports: ports.map((host_port) => ({ host_port, guest_port: 80 })) });

test("a policy is kept in one form, with its defaults, and shown", async (t) => {
  const { hypervisor } = await wakeWorld(t, { table: { http_listen: "127.0.0.1:0" } });
  const port = await freePort();
  const wanted = { ...portsOf(port), hosts: ["App.Example.TEST", "app.example.test."], timeout: "90s" };
  const instance = await hypervisor.create(body("a", wanted), ORIGIN);
  assert.deepEqual(hypervisor.present(instance).wake, {
    enabled: true,
    ports: [{ host_port: port, guest_port: 80, protocol: "tcp" }],
    hosts: ["app.example.test"],
    ready: "connect",
    timeout: "1m30s",
  });
  const cleared = await hypervisor.update(instance.id, { wake: null }, ORIGIN);
  assert.equal(hypervisor.present(cleared).wake, undefined);
});

test("a policy is refused where it is wrong or cannot work", async (t) => {
  const { hypervisor } = await wakeWorld(t);
  const cases: [unknown, RegExp][] = [
    [{ ports: [{ host_port: 0, guest_port: 80 }] }, /wake\.ports\.0\.host_port/],
    [{ ports: [{ host_port: 65_536, guest_port: 80 }] }, /wake\.ports\.0\.host_port/],
    [{ ports: [{ host_port: 8000, guest_port: 80, protocol: "udp" }] }, /wake\.ports\.0\.protocol/],
    [portsOf(8000, 8000), /host port 8000 is there twice/],
    [{ ports: [{ host_port: 8000, guest_port: 8000 }] }, /8000 leads to itself/],
    [{ hosts: ["not a host"] }, /wake\.hosts\.0/],
    [{ hosts: ["a.test"] }, /no http_listen in \[plugins\.wake\]/],
    [{ ready: "health" }, /needs the plugin "health"/],
    [{ ready: "soon" }, /wake\.ready/],
    [{ timeout: "0s" }, /wake\.timeout/],
    [{ timeout: "soon" }, /wake\.timeout/],
    [{ prots: [] }, /wake\.prots/],
    ["yes", /wake/],
  ];
  for (const [policy, message] of cases) {
    await assert.rejects(hypervisor.create(body("a", policy), ORIGIN), coded("invalid_wake", message), String(message));
  }
  assert.deepEqual(hypervisor.list(), []);
});

test("a host port or host of another instance is refused by the holder's name, also for two at once", async (t) => {
  const { hypervisor } = await wakeWorld(t, { table: { http_listen: "127.0.0.1:0" } });
  const port = await freePort();
  const both = await Promise.allSettled(
    ["a", "b"].map((name) => hypervisor.create(body(name, portsOf(port)), ORIGIN)),
  );
  assert.deepEqual(both.map(({ status }) => status), ["fulfilled", "rejected"]);
  assert.ok(coded("port_conflict", /host port "\d+": instance "a" has it/)((both[1] as PromiseRejectedResult).reason));
  assert.deepEqual(hypervisor.list().map(({ name }) => name), ["a"], "nothing half done");
  const c = await hypervisor.create(body("c", { hosts: ["c.test"] }), ORIGIN);
  await assert.rejects(
    hypervisor.create(body("d", { hosts: ["C.test"] }), ORIGIN),
    coded("host_conflict", /host "c\.test": instance "c" has it/),
  );
  await assert.rejects(hypervisor.update(c.id, { wake: portsOf(port) }, ORIGIN), coded("port_conflict", /"a"/));
  assert.deepEqual(hypervisor.find(c.id)!.policies, c.policies, "the update changed nothing");
  // What is given up is free for another.
  await hypervisor.update(hypervisor.resolve("a").id, { wake: null }, ORIGIN);
  await hypervisor.update(c.id, { wake: portsOf(port) }, ORIGIN);
  await hypervisor.delete(c.id, ORIGIN);
  await hypervisor.create(body("e", { ...portsOf(port), hosts: ["c.test"] }), ORIGIN);
});

test("a host port that another program has is refused, and bound once it is free", async (t) => {
  const { hypervisor } = await wakeWorld(t);
  const port = await freePort();
  const other = createServer().listen(port, "127.0.0.1");
  await once(other, "listening");
  cleanup(t).defer(() => void other.close());
  const refused = coded("port_conflict", /another program listens on it/);
  await assert.rejects(hypervisor.create(body("a", portsOf(port)), ORIGIN), refused);
  assert.deepEqual(hypervisor.list(), []);
  const { id } = await hypervisor.create(body("a", undefined), ORIGIN);
  await assert.rejects(hypervisor.update(id, { wake: portsOf(port) }, ORIGIN), refused);
  other.close();
  await once(other, "close");
  await hypervisor.update(id, { wake: portsOf(port) }, ORIGIN);
});

test("a fork has its source's policy without its ports and hosts", async (t) => {
  const { hypervisor, make } = await wakeWorld(t, { table: { http_listen: "127.0.0.1:0" } });
  const { id } = await make("source", { hosts: ["a.test"], timeout: "5s", start_on_demand: true });
  await hypervisor.stop(id, ORIGIN);
  const fork = await hypervisor.fork(id, { name: "copy" }, ORIGIN);
  const { ports, hosts, timeout, start_on_demand } = hypervisor.present(fork).wake as Record<string, unknown>;
  assert.deepEqual({ ports, hosts, timeout, start_on_demand }, {
    ports: [],
    hosts: [],
    timeout: "5s",
    start_on_demand: true,
  });
});

// W21: sleep without wake is refused unless it says so.
test("an instance that could sleep and never wake is refused unless it says so", async (t) => {
  const sleeper: Plugin = {
    name: "sleeper",
    requires: ["hypervisor"],
    setup: (host) => void host.use("hypervisor").extend({ field: "auto_standby", schema: v.looseObject({}) }),
  };
  const { hypervisor } = await wakeWorld(t, { plugins: [sleeper] });
  const auto_standby = { enabled: true, idle_timeout: "5m" };
  const refused = coded("invalid_wake", /no connection could wake it/);
  await assert.rejects(hypervisor.create(body("a", undefined, { auto_standby }), ORIGIN), refused);
  const { id } = await hypervisor.create(body("a", undefined), ORIGIN);
  await assert.rejects(hypervisor.update(id, { auto_standby }, ORIGIN), refused);
  await hypervisor.update(id, { auto_standby, wake: { enabled: false } }, ORIGIN);
  await assert.rejects(hypervisor.update(id, { wake: null }, ORIGIN), refused);
  await hypervisor.update(id, { wake: portsOf(await freePort()) }, ORIGIN);
});

test("ports and hosts are known again after a restart", async (t) => {
  const folder = temporaryFolder(t);
  const driver = new Machines();
  const first = await wakeWorld(t, { folder, driver });
  const { port } = await first.make("web");
  await first.host.close();
  const second = await wakeWorld(t, { folder, driver });
  assert.equal(await talk(port, "hello"), "hello");
  await assert.rejects(second.hypervisor.create(body("b", portsOf(port)), ORIGIN), coded("port_conflict", /"web"/));
});
