import assert from "node:assert/strict";
import { test } from "node:test";
import { getLogger } from "@logtape/logtape";
import type { Flow } from "../../main.ts";
import { WatchedAddresses } from "../../plugins/conntrack/addresses.ts";
import type { ConntrackSource } from "../../plugins/conntrack/flow.ts";
import { Hub } from "../../plugins/conntrack/hub.ts";

const flow = (destination: string): Flow => ({
  protocol: "tcp",
  source: "192.0.2.1",
  source_port: 1,
  destination,
  destination_port: 80,
  state: "ESTABLISHED",
});

function hub() {
  const watched = new WatchedAddresses();
  return { watched, hub: new Hub(watched, getLogger(["dormouse", "test"])) };
}

test("watch() hands an event to each who watches its address, until it is undone", () => {
  const { watched, hub: it } = hub();
  const heard: string[] = [];
  const [a, b] = ["a", "b"].map((name) => it.watch("10.0.0.2", (kind) => heard.push(`${name} ${kind}`)));
  it.event("new", flow("10.0.0.2"));
  it.event("new", flow("10.0.0.3"));
  a[Symbol.dispose]();
  assert.equal(watched.size, 1);
  it.event("destroy", flow("10.0.0.2"));
  b[Symbol.dispose]();
  b[Symbol.dispose]();
  it.event("new", flow("10.0.0.2"));
  assert.deepEqual(heard, ["a new", "b new", "b destroy"]);
  assert.equal(watched.size, 0);
});

test("watch() goes on over the listeners that it began with when one undoes itself", () => {
  const { hub: it } = hub();
  const heard: string[] = [];
  const first = it.watch("10.0.0.2", () => {
    heard.push("first");
    first[Symbol.dispose]();
  });
  it.watch("10.0.0.2", () => heard.push("second"));
  it.event("new", flow("10.0.0.2"));
  it.event("new", flow("10.0.0.2"));
  assert.deepEqual(heard, ["first", "second", "second"]);
});

test("follow() tells those who come late that it is connected, and all when it is lost", async () => {
  const { hub: it } = hub();
  const heard: string[] = [];
  const follower = (name: string) => ({
    connected: () => void heard.push(`${name} connected`),
    lost: (reason: string) => void heard.push(`${name} lost ${reason}`),
  });
  it.follow(follower("early"));
  assert.equal(it.error, "not connected yet");
  it.connected();
  it.follow(follower("late"));
  const gone = it.follow(follower("gone"));
  gone[Symbol.dispose]();
  await Promise.resolve();
  it.lost("overflow");
  assert.equal(it.error, "overflow");
  assert.deepEqual(heard, ["early connected", "late connected", "early lost overflow", "late lost overflow"]);
});

test("follow() tells the others when one throws", () => {
  const { hub: it } = hub();
  const heard: string[] = [];
  it.follow({
    connected: () => {
      throw new Error("broken follower");
    },
    lost() {},
  });
  it.follow({ connected: () => void heard.push("connected"), lost() {} });
  it.connected();
  assert.deepEqual(heard, ["connected"]);
});

test("dump() rejects with the reason where there is no source", async () => {
  const { hub: it } = hub();
  it.unsupported("this machine has no conntrack");
  await assert.rejects(it.dump(), /no conntrack/);
});

test("dump() asks the source for the addresses, and stats() counts its troubles", async () => {
  const { hub: it } = hub();
  const asked: unknown[] = [];
  const source = {
    name: "netlink",
    start() {},
    dump: async (options: unknown) => (asked.push(options), [flow("10.0.0.2")]),
    close: async () => {},
    stats: () => ({ events: 3, overflows: 1, malformed: 2 }),
  } as unknown as ConntrackSource;
  it.listenTo(source);
  const addresses = new Set(["10.0.0.2"]);
  assert.deepEqual(await it.dump(addresses), [flow("10.0.0.2")]);
  assert.deepEqual(asked, [{ addresses }]);
  assert.deepEqual(it.stats(), { events: 3, dropped: 1, malformed: 2, resyncs: 0 });
});
