import assert from "node:assert/strict";
import { describe, it } from "node:test";
import { settle } from "../clock.ts";
import { ORIGIN } from "../hypervisor/scripted.ts";
import { world } from "./world.ts";

const names = (count: number) => Array.from({ length: count }, (_, i) => `i${i}`);

describe("many instances", () => {
  // H2: more are due than may be probed, and some never answer.
  it("are all probed again and again, so many at a time, whoever hangs", async (t) => {
    const { clock, driver, health, make, probed, status } = await world(t, { table: { max_concurrent: 4 } });
    let [running, most] = [0, 0];
    driver.answer = async ({ name }, { signal }) => {
      most = Math.max(most, ++running);
      const aborted = Promise.withResolvers<number>();
      signal!.addEventListener("abort", () => aborted.reject(signal!.reason));
      // A third of them answers never, the others within their turn.
      try {
        return await (Number(name.slice(1)) % 3 === 0 ? aborted.promise : 0);
      } finally {
        running--;
      }
    };
    const made = await Promise.all(names(30).map((name) => make(name, { interval: "1s", timeout: "1s" })));
    await clock.pass(60_000);
    assert.equal(most, 4);
    // Ten that hang for a second each in four places take 2.5 s, and everybody's turn comes between two of theirs.
    for (const { id, name } of made) {
      const times = probed.filter(({ instance_id }) => instance_id === id).length;
      assert.ok(times >= 60 / (1 + 2.5 + 1) - 1, `${name} was probed ${times} times`);
      assert.ok(Date.parse(status(id).last_checked_at as string) >= clock.now() - 5_000, name);
    }
    assert.ok(health.stats().waiting > 0);
    driver.answer = () => 0;
    await clock.pass(3_000);
    assert.deepEqual(health.stats(), { running: 0, waiting: 0 });
    const before = probed.length;
    await clock.pass(10_000);
    assert.equal(probed.length - before, 300, "and none has been forgotten");
  });

  it("that wait for a wake pass those that are only due", async (t) => {
    const { clock, driver, health, host, make } = await world(t, { table: { max_concurrent: 1 } });
    const ends: (() => void)[] = [];
    driver.answer = () => new Promise((resolve) => ends.push(() => resolve(0)));
    const made = await Promise.all(names(4).map((name) => make(name)));
    await clock.pass(0);
    assert.deepEqual(health.stats(), { running: 1, waiting: 3 });
    const last = made.find(({ name }) => name === "i3")!;
    const ready = host.hooks.ask("wake:ready", { instance: last, signal: new AbortController().signal });
    for (let i = 0; i < 4; i++) {
      await settle();
      ends[i]();
    }
    await ready;
    await clock.pass(0);
    assert.deepEqual(driver.execs, ["i0", "i3", "i1", "i2"]);
  });

  it("that leave while they wait give their place away", async (t) => {
    const { clock, driver, health, hypervisor, make } = await world(t, { table: { max_concurrent: 1 } });
    const ends: (() => void)[] = [];
    driver.answer = () => new Promise((resolve) => ends.push(() => resolve(0)));
    const made = await Promise.all(names(3).map((name) => make(name)));
    await clock.pass(0);
    await hypervisor.standby(made.find(({ name }) => name === "i1")!.id, ORIGIN);
    await settle();
    assert.deepEqual(health.stats(), { running: 1, waiting: 1 });
    ends[0]();
    await clock.pass(0);
    assert.deepEqual(driver.execs, ["i0", "i2"]);
  });

  // S9: what is written does not grow with the probes.
  it("are written a row each half minute at most, and at once where their status changes", async (t) => {
    const { clock, driver, host, make, probed } = await world(t, { random: Math.random });
    await Promise.all(names(20).map((name) => make(name, { interval: "1s", timeout: "1s" })));
    await clock.pass(31_000);
    const { db } = host.use("store");
    const rows = () => db.prepare("SELECT total_changes() AS n").get()!.n as number;
    let [writes, probes] = [rows(), probed.length];
    await clock.pass(60_000);
    assert.equal(probed.length - probes, 20 * 60);
    assert.ok(rows() - writes <= 20 * (60 / 30 + 1), `${rows() - writes} rows`);
    assert.ok(rows() - writes >= 20 * (60 / 30 - 1), "and they are written");

    const bodies = () =>
      db.prepare("SELECT body FROM runtimes").all().map(({ body }) => JSON.parse(body as string).told as string);
    driver.answer = () => 1;
    [writes, probes] = [rows(), probed.length];
    await clock.pass(4_000);
    assert.deepEqual(new Set(bodies()), new Set(["unhealthy"]));
    // The row and the number of its note, and what was due anyway.
    assert.ok(rows() - writes <= 20 * 2 + 20, `${rows() - writes} rows`);
  });
});
