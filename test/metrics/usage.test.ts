import assert from "node:assert/strict";
import { test } from "node:test";
import { temporaryFolder, until } from "../helpers.ts";
import { metricsWorld, of, ORIGIN, type Series } from "./world.ts";

const CPU = "dormouse_instance_cpu_seconds_total";
const MEMORY = "dormouse_instance_memory_bytes";
const RECEIVED = "dormouse_instance_network_receive_bytes_total";

/** By name alone. */
const named = (series: Series, metric: string) =>
  Object.fromEntries(Object.entries(of(series, metric)).map(([key, value]) => [/name="([^"]*)"/.exec(key)![1], value]));

test("usage tells CPU, memory and network of each instance", async (t) => {
  const { make, driver, scrape } = await metricsWorld(t);
  const [{ id }] = await make("web");
  driver.uses.set("web", { cpu_seconds: 1.5, memory_rss_bytes: 1024, network_rx_bytes: 10, network_tx_bytes: 20 });
  const series = await scrape();
  const labels = `{name="web",id="${id}"}`;
  assert.deepEqual(of(series, CPU), { [labels]: 1.5 });
  assert.deepEqual(of(series, MEMORY), { [labels]: 1024 });
  assert.deepEqual(of(series, RECEIVED), { [labels]: 10 });
  assert.deepEqual(of(series, "dormouse_instance_network_transmit_bytes_total"), { [labels]: 20 });
  assert.equal(series['dormouse_instance_reads_total{result="ok"}'], 1);
});

test("usage gives labels to those created first and sums the others", async (t) => {
  const { make, driver, scrape, host, clock } = await metricsWorld(t, { table: { instance_label_budget: 2 } });
  const [first] = await make("a", "b", "c", "d");
  for (const [i, name] of ["a", "b", "c", "d"].entries()) {
    driver.uses.set(name, { cpu_seconds: 10 ** i, memory_rss_bytes: 1 + i });
  }
  let series = await scrape();
  assert.deepEqual(named(series, CPU), { a: 1, b: 10, _other: 1_100 });
  assert.deepEqual(named(series, MEMORY), { a: 1, b: 2, _other: 7 });
  assert.equal(series.dormouse_instances_unlabelled, 2);
  // Those that have labels keep them, whatever happens to them; a place that is free goes to the next in line.
  await host.use("hypervisor").stop((await host.use("hypervisor").resolve("b")).id, ORIGIN);
  await make("e");
  await clock.pass(5_000);
  assert.deepEqual(Object.keys(named(await scrape(), CPU)), ["a", "b", "_other"]);
  await host.use("hypervisor").delete(first.id, ORIGIN);
  driver.uses.set("c", { cpu_seconds: 150 });
  await clock.pass(5_000);
  series = await scrape();
  assert.deepEqual(named(series, CPU), { b: 10, c: 150, _other: 1_100 }, "what is summed never goes down");
});

test("usage keeps the labels of the same instances over a restart of the host", async (t) => {
  const folder = temporaryFolder(t);
  const table = { instance_label_budget: 2 };
  const before = await metricsWorld(t, { folder, table });
  const [, b] = await before.make("a", "b", "c", "d");
  await before.host.use("hypervisor").update(b.id, { tags: { x: "y" } }, ORIGIN);
  const names = Object.keys(named(await before.scrape(), CPU));
  await before.host.close();
  const after = await metricsWorld(t, { folder, table, driver: before.driver });
  assert.deepEqual(Object.keys(named(await after.scrape(), CPU)), names);
  assert.deepEqual(names, ["a", "b", "_other"]);
});

test("usage sums what is used from now on, not what others used before this host", async (t) => {
  const folder = temporaryFolder(t);
  const table = { instance_label_budget: 1 };
  const before = await metricsWorld(t, { folder, table });
  await before.make("a", "b");
  before.driver.uses.set("a", { cpu_seconds: 500 });
  before.driver.uses.set("b", { cpu_seconds: 1_000 });
  assert.deepEqual(named(await before.scrape(), CPU), { a: 500, _other: 1_000 });
  await before.host.close();
  await new Promise((resolve) => setTimeout(resolve, 2)); // the registry's clock goes by milliseconds
  const after = await metricsWorld(t, { folder, table, driver: before.driver });
  assert.deepEqual(named(await after.scrape(), CPU), { a: 500, _other: 0 });
  before.driver.uses.set("b", { cpu_seconds: 1_007 });
  await after.clock.pass(5_000);
  assert.deepEqual(named(await after.scrape(), CPU), { a: 500, _other: 7 });
});

test("usage never goes down when an instance is started anew, and counts what it uses from then on", async (t) => {
  const { make, driver, scrape, host, clock } = await metricsWorld(t);
  const [{ id }] = await make("web");
  const hypervisor = host.use("hypervisor");
  const cpu = async (cpu_seconds: number) => {
    driver.uses.set("web", { cpu_seconds });
    await clock.pass(5_000);
    return named(await scrape(), CPU).web;
  };
  assert.equal(await cpu(100), 100);
  assert.equal(await cpu(60), 100, "a process of it has ended");
  assert.equal(await cpu(61), 101);
  await hypervisor.stop(id, ORIGIN);
  assert.equal(await cpu(0), 101, "it is not read");
  await new Promise((resolve) => setTimeout(resolve, 2)); // the registry's clock goes by milliseconds
  await hypervisor.start(id, ORIGIN);
  assert.equal(await cpu(5), 106);
});

test("usage leaves those alone that sleep or have stopped", async (t) => {
  const { make, driver, scrape, host, clock } = await metricsWorld(t);
  const [asleep, stopped] = await make("asleep", "stopped", "awake");
  for (const name of ["asleep", "stopped", "awake"]) driver.uses.set(name, { cpu_seconds: 3, memory_rss_bytes: 7 });
  await scrape();
  await host.use("hypervisor").standby(asleep.id, ORIGIN);
  await host.use("hypervisor").stop(stopped.id, ORIGIN);
  driver.reads.length = 0;
  await clock.pass(5_000);
  const series = await scrape();
  assert.deepEqual(driver.reads, ["awake"]);
  assert.deepEqual(named(series, CPU), { asleep: 3, stopped: 3, awake: 3 });
  assert.deepEqual(named(series, MEMORY), { awake: 7 }, "nobody knows what a sleeping one still has in RAM");
});

test("usage is read once within stats_max_age, however many scrapes there are", async (t) => {
  const { make, driver, scrape, clock } = await metricsWorld(t, { table: { stats_max_age: "10s" } });
  await make("a", "b");
  await Promise.all([scrape(), scrape(), scrape()]);
  await clock.pass(9_999);
  await scrape();
  assert.deepEqual(driver.reads, ["a", "b"]);
  await clock.pass(1);
  await scrape();
  assert.deepEqual(driver.reads, ["a", "b", "a", "b"]);
});

test("usage counts readings that fail, and goes on with the others", async (t) => {
  const { make, driver, scrape } = await metricsWorld(t);
  await make("a", "broken", "c");
  driver.reading = ({ name }) => {
    if (name === "broken") throw new Error("no answer");
  };
  const series = await scrape();
  assert.deepEqual(named(series, CPU), { a: 0, c: 0 });
  assert.deepEqual(of(series, "dormouse_instance_reads_total"), {
    '{result="ok"}': 2,
    '{result="failed"}': 1,
    '{result="late"}': 0,
  });
});

test("usage does not wait for a reading that hangs, nor begins another of it", async (t) => {
  const { make, driver, scrape, clock } = await metricsWorld(t);
  await make("a", "hangs", "c");
  const { promise, resolve } = Promise.withResolvers<void>();
  driver.reading = ({ name }) => name === "hangs" ? promise : undefined;
  driver.uses.set("c", { cpu_seconds: 2 });
  let series = await scrape();
  assert.deepEqual(named(series, CPU), { a: 0, c: 2 });
  await until("it counts as late", async () => (await scrape())['dormouse_instance_reads_total{result="late"}'] === 1);
  driver.uses.set("c", { cpu_seconds: 3 });
  await clock.pass(5_000);
  series = await scrape();
  assert.deepEqual(named(series, CPU), { a: 0, c: 3 });
  assert.equal(driver.reads.filter((name) => name === "hangs").length, 1);
  resolve();
  await clock.pass(5_000);
  assert.deepEqual(Object.keys(named(await scrape(), CPU)), ["a", "hangs", "c"]);
});

test("a scrape bears a few milliseconds of readings; the others are read soon after, by themselves", async (t) => {
  const { make, driver, scrape, clock } = await metricsWorld(t);
  await make(...Array.from({ length: 60 }, (_, i) => `w${i}`));
  const all = Promise.withResolvers<void>();
  // Drivers that read files do so without a pause.
  driver.reading = () => {
    for (const end = performance.now() + 1; performance.now() < end;);
    if (driver.reads.length >= 60) all.resolve();
  };
  const first = Object.keys(of(await scrape(), CPU)).length;
  assert.ok(first > 0 && first < 60, `${first} of 60 were read at once`);
  await all.promise;
  await new Promise((resolve) => setImmediate(resolve));
  assert.equal(Object.keys(of(await scrape(), CPU)).length, 60);
  assert.equal(new Set(driver.reads).size, 60);
  await clock.pass(1);
});

test("usage forgets those that are deleted", async (t) => {
  const { make, scrape, host, clock } = await metricsWorld(t);
  const [{ id }] = await make("gone", "kept");
  await scrape();
  await host.use("hypervisor").delete(id, ORIGIN);
  assert.deepEqual(named(await scrape(), CPU), { kept: 0 });
  await clock.pass(5_000);
  await make("gone");
  assert.deepEqual(Object.keys(of(await scrape(), CPU)).filter((key) => key.includes(id)), []);
});
