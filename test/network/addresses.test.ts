import assert from "node:assert/strict";
import { test, type TestContext } from "node:test";
import * as fc from "fast-check";
import { DormouseError, type RunningHost } from "../../main.ts";
import { Addresses } from "../../plugins/network/addresses.ts";
import { parseSubnet, type Subnet } from "../../plugins/network/subnet.ts";
import storePlugin from "../../plugins/store.ts";
import { startWith, temporaryFolder } from "../helpers.ts";

const subnetOf = (cidr: string) => parseSubnet(cidr) as Subnet;

function openIn(t: TestContext, folder: string): Promise<RunningHost> {
  return startWith(t, [storePlugin], { folder });
}

const coded = (code: string, message: RegExp) => (error: unknown) =>
  error instanceof DormouseError && error.code === code && message.test(error.message);

test("allocate() gives each instance one address, until all are in use", async (t) => {
  const addresses = new Addresses((await openIn(t, temporaryFolder(t))).use("store"), subnetOf("10.9.0.8/29"));
  const given = ["a", "b", "c", "d", "e"].map((id) => addresses.allocate(id));
  assert.deepEqual(given, ["10.9.0.10", "10.9.0.11", "10.9.0.12", "10.9.0.13", "10.9.0.14"]);
  assert.equal(addresses.allocate("c"), "10.9.0.12", "the same instance asks again");
  assert.throws(() => addresses.allocate("f"), coded("insufficient_resources", /10\.9\.0\.8\/29: all 5 are in use/));
  addresses.release("d");
  addresses.release("b");
  addresses.release("nobody");
  assert.deepEqual([addresses.allocate("f"), addresses.allocate("g")], ["10.9.0.13", "10.9.0.11"]);
});

test("allocate() and release() are undone with the caller's transaction", async (t) => {
  const store = (await openIn(t, temporaryFolder(t))).use("store");
  const addresses = new Addresses(store, subnetOf("10.9.0.8/29"));
  const kept = addresses.allocate("kept");
  const stop = new Error("stop");
  assert.throws(() =>
    store.transaction(() => {
      addresses.allocate("gone");
      addresses.release("kept");
      throw stop;
    }), stop);
  assert.deepEqual([...addresses.all()], [["kept", kept]]);
  assert.notEqual(addresses.allocate("next"), kept);
});

test("Addresses refuses another subnet while instances have addresses of the old one", async (t) => {
  const store = (await openIn(t, temporaryFolder(t))).use("store");
  const before = new Addresses(store, subnetOf("10.9.0.0/24"));
  before.allocate("a");
  const refused = coded("config_invalid", /subnet "10\.10\.0\.0\/24": 1 instances have addresses of "10\.9\.0\.0\/24"/);
  assert.throws(() => new Addresses(store, subnetOf("10.10.0.0/24")), refused);
  before.release("a");
  assert.equal(new Addresses(store, subnetOf("10.10.0.0/24")).allocate("b"), "10.10.0.2");
});

test("the allocator never gives an address twice, reuses the one that rested longest, and survives a restart", async (t) => {
  const step = fc.oneof(
    { weight: 6, arbitrary: fc.record({ kind: fc.constant("allocate" as const), id: fc.nat(40) }) },
    { weight: 5, arbitrary: fc.record({ kind: fc.constant("release" as const), id: fc.nat(40) }) },
    { weight: 1, arbitrary: fc.constant({ kind: "reopen" as const, id: 0 }) },
  );
  const subnet = subnetOf("10.9.0.0/28");
  const run = async (steps: { kind: "allocate" | "release" | "reopen"; id: number }[]) => {
    const folder = temporaryFolder(t);
    let host = await openIn(t, folder);
    let addresses = new Addresses(host.use("store"), subnet);
    const inUse = new Map<string, string>();
    // The model: a queue that starts with every address in order, and takes back what is released at its end.
    const queue = Array.from({ length: subnet.last - subnet.first + 1 }, (_, index) => subnet.ip(subnet.first + index));
    for (const { kind, id } of steps) {
      const name = `instance-${id}`;
      if (kind === "reopen") {
        await host.close();
        host = await openIn(t, folder);
        addresses = new Addresses(host.use("store"), subnet);
      } else if (kind === "release") {
        addresses.release(name);
        if (inUse.has(name)) queue.push(inUse.get(name)!);
        inUse.delete(name);
      } else if (!inUse.has(name) && queue.length === 0) {
        assert.throws(() => addresses.allocate(name), coded("insufficient_resources", /in use/));
      } else {
        const expected = inUse.get(name) ?? queue.shift()!;
        assert.equal(addresses.allocate(name), expected);
        inUse.set(name, expected);
      }
    }
    assert.deepEqual(new Map([...addresses.all()].sort()), new Map([...inUse].sort()));
    await host.close();
  };
  await fc.assert(fc.asyncProperty(fc.array(step, { maxLength: 60 }), run), { numRuns: 25 });
});

test("allocate() is answered from an index when 60,000 addresses are in use", async (t) => {
  const store = (await openIn(t, temporaryFolder(t))).use("store");
  const addresses = new Addresses(store, subnetOf("10.9.0.0/16"));
  store.transaction(() => {
    for (let n = 0; n < 65_533; n++) addresses.allocate(`instance-${n}`);
  });
  assert.throws(() => addresses.allocate("one more"), coded("insufficient_resources", /all 65533/));
  assert.equal(new Set(addresses.all().values()).size, 65_533);
  store.transaction(() => {
    // 30,000 searches through 60,000 rows each would outlast any patience.
    for (let n = 0; n < 30_000; n++) addresses.release(`instance-${n}`);
    for (let n = 0; n < 30_000; n++) addresses.allocate(`other-${n}`);
  });
  assert.equal(new Set(addresses.all().values()).size, 65_533);
});
