import assert from "node:assert/strict";
import { test, type TestContext } from "node:test";
import { DormouseError, type Driver, type Instance, type State } from "../../main.ts";
import { lacking, until } from "../helpers.ts";

/** One data_dir of a driver, and what the suite must know of it to try the driver out. */
export interface DriverFixture {
  /**
   * A driver as a host has it after its start. Each call stands for one more host on the same data_dir, after the one
   * before was killed: that is not told, and never used again.
   */
  open(): Driver;
  /** An instance that counts for ever, many times a second, and ends on request at once. */
  counting(): Instance;
  /** Where the counting is; 0 before it begins. */
  count(instance: Instance): Promise<number>;
  /** An instance that ends by itself with this exit code. */
  ending(code: number): Instance;
  /** One that goes on when it is asked to end. */
  stubborn(): Instance;
  /** What cannot be run, by what is wrong with it. */
  invalid(): Record<string, Instance>;
  /** Resolves at the next `changed` for the instance, of whichever host is open. */
  changed(instance: Instance): Promise<void>;
  /** Makes it impossible to tell what the instance is doing. */
  blind(instance: Instance): void;
  /** The names of what is left of the instance: processes, cgroups, namespaces, files. */
  remains(instance: Instance): string[];
}

export interface DriverContract {
  name: string;
  make(t: TestContext): DriverFixture;
  /** Why it cannot run here. */
  lacking?: string | null;
}

const NEVER = new AbortController().signal;

/** What holds for every driver; a driver's own tests add only what is its own. */
export function driverContract({ name, make, lacking: reason = null }: DriverContract): void {
  // Not in a suite: there Deno does not run what `t.after` was given.
  const check = (title: string, body: (fixture: DriverFixture) => Promise<void>) =>
    test(`${name}: ${title}`, { skip: lacking(reason), timeout: 600_000 }, (t) => body(make(t)));

  check("features names exactly the methods that are there", async (fixture) => {
    const driver = fixture.open();
    assert.equal(driver.unavailable(), null);
    const methods = {
      pause: ["pause", "resume"],
      standby: ["standby", "restore"],
      fork: ["fork"],
      exec: ["exec"],
      stats: ["stats"],
      stat: ["stat"],
      logs: ["logs"],
    } as const;
    for (const [feature, names] of Object.entries(methods)) {
      for (const method of names) {
        const expected = driver.features.has(feature as keyof typeof methods);
        assert.equal(typeof driver[method] === "function", expected, `${feature}: ${method}()`);
      }
    }
  });

  check("validate() takes what can be run and refuses the rest with a 4xx", async (fixture) => {
    const driver = fixture.open();
    for (const instance of [fixture.counting(), fixture.ending(0), fixture.stubborn()]) {
      await driver.validate(instance);
    }
    for (const [what, instance] of Object.entries(fixture.invalid())) {
      await assert.rejects(async () => await driver.validate(instance), (error) => {
        assert(error instanceof DormouseError, `${what}: ${error}`);
        assert(error.status >= 400 && error.status < 500, `${what}: ${error.code}`);
        return true;
      });
      assert.deepEqual(fixture.remains(instance), [], what);
    }
  });

  check("start() runs it, stop() ends it, start() runs it anew, delete() removes it", async (fixture) => {
    const driver = fixture.open();
    const instance = fixture.counting();
    await driver.create(instance);
    assert.equal((await driver.inspect(instance)).state, "Stopped");
    for (let round = 0; round < 2; round++) {
      await start(fixture, driver, instance);
      const exit = await driver.stop(instance, NEVER);
      assert.deepEqual(await driver.inspect(instance), { state: "Stopped", ...exit });
    }
    await driver.delete(instance);
    assert.deepEqual(fixture.remains(instance), []);
  });

  check("start() leaves alone what a host before it started, and changed() tells of its end", async (fixture) => {
    const instance = fixture.counting();
    const first = fixture.open();
    await first.create(instance);
    await start(fixture, first, instance);
    const second = fixture.open();
    assert.equal((await second.adopt(instance)).state, "Running");
    const before = await fixture.count(instance);
    assert.equal(await second.start(instance, NEVER), "Running");
    await counts(fixture, instance, before);
    const changed = fixture.changed(instance);
    const exit = await second.stop(instance, NEVER);
    await changed;
    assert.deepEqual(await second.inspect(instance), { state: "Stopped", ...exit });
    await second.delete(instance);
    assert.deepEqual(fixture.remains(instance), []);
  });

  check("start() rejects with the signal's reason and runs nothing when it is aborted before", async (fixture) => {
    const driver = fixture.open();
    const instance = fixture.counting();
    await driver.create(instance);
    const reason = new Error("no longer wanted");
    await assert.rejects(driver.start(instance, AbortSignal.abort(reason)), (error) => error === reason);
    assert.equal((await driver.inspect(instance)).state, "Stopped");
    await driver.delete(instance);
    assert.deepEqual(fixture.remains(instance), []);
  });

  for (const code of [0, 3]) {
    check(`changed() is called when it ends with ${code}, which inspect() tells`, async (fixture) => {
      const driver = fixture.open();
      const instance = fixture.ending(code);
      await driver.create(instance);
      const changed = fixture.changed(instance);
      await driver.start(instance, NEVER);
      await changed;
      await until("it is stopped", async () => (await driver.inspect(instance)).state === "Stopped");
      const told = await driver.inspect(instance);
      assert.equal(told.state === "Stopped" && told.exit_code, code);
      // S2: and a host that was not there at the time knows it too.
      assert.deepEqual(await fixture.open().adopt(instance), told);
      await driver.delete(instance);
      assert.deepEqual(fixture.remains(instance), []);
    });
  }

  check("stop() does nothing to what is stopped, on any host", async (fixture) => {
    const driver = fixture.open();
    const instance = fixture.counting();
    await driver.create(instance);
    assert.deepEqual(await driver.stop(instance, NEVER), { exit_code: null, exit_message: null });
    await start(fixture, driver, instance);
    const exit = await driver.stop(instance, NEVER);
    assert.deepEqual(await driver.stop(instance, NEVER), exit);
    assert.deepEqual(await fixture.open().stop(instance, NEVER), exit);
    await driver.delete(instance);
  });

  check("stop() ends at once what will not end when its signal aborts", async (fixture) => {
    const driver = fixture.open();
    const instance = fixture.stubborn();
    await driver.create(instance);
    await start(fixture, driver, instance);
    const hurry = new AbortController();
    const stopped = driver.stop(instance, hurry.signal);
    const before = await fixture.count(instance);
    await counts(fixture, instance, before);
    hurry.abort();
    const exit = await stopped;
    assert.deepEqual(await driver.inspect(instance), { state: "Stopped", ...exit });
    await driver.delete(instance);
    assert.deepEqual(fixture.remains(instance), []);
  });

  check("pause() and standby() keep its memory, over a new host too", async (fixture) => {
    const driver = fixture.open();
    const [instance, witness] = [fixture.counting(), fixture.counting()];
    for (const each of [instance, witness]) {
      await driver.create(each);
      await start(fixture, driver, each);
    }
    for (const [state, sleep, wake] of SLEEPS.filter(([, sleep]) => driver.features.has(sleep))) {
      const first = fixture.open();
      await first[sleep]!(instance, NEVER);
      assert.equal((await first.inspect(instance)).state, state);
      // What the kernel was at for it when it was stopped is done by then.
      await counts(fixture, witness, await fixture.count(witness));
      const before = await fixture.count(instance);
      await counts(fixture, witness, await fixture.count(witness));
      assert.equal(await fixture.count(instance), before);
      // As a host that died before it could note it: the next one asks again.
      const second = fixture.open();
      assert.equal((await second.adopt(instance)).state, state);
      await second[sleep]!(instance, NEVER);
      assert.equal((await second.inspect(instance)).state, state);
      await second[wake]!(instance, NEVER);
      assert.equal((await second.inspect(instance)).state, "Running");
      await counts(fixture, instance, before);
      const third = fixture.open();
      assert.equal((await third.adopt(instance)).state, "Running");
      await third[wake]!(instance, NEVER);
      await counts(fixture, instance, await fixture.count(instance));
    }
    const last = fixture.open();
    for (const each of [instance, witness]) await last.delete(each);
    assert.deepEqual([...fixture.remains(instance), ...fixture.remains(witness)], []);
  });

  check("standby() goes back to running and rejects with the signal's reason when it is aborted", async (fixture) => {
    const driver = fixture.open();
    if (!driver.features.has("standby")) return;
    const instance = fixture.counting();
    await driver.create(instance);
    await start(fixture, driver, instance);
    const reason = new Error("a request came in");
    await assert.rejects(driver.standby!(instance, AbortSignal.abort(reason)), (error) => error === reason);
    assert.equal((await driver.inspect(instance)).state, "Running");
    // R8: while it is under way, it either came too late or is undone; never something in between.
    const abort = new AbortController();
    const standby = driver.standby!(instance, abort.signal).then(() => "Standby", (error) => {
      assert.equal(error, reason);
      return "Running";
    });
    abort.abort(reason);
    assert.equal((await driver.inspect(instance)).state, await standby);
    await driver.restore!(instance, NEVER);
    await counts(fixture, instance, await fixture.count(instance));
    await driver.delete(instance);
  });

  check("delete() leaves nothing of it in any state, on a host that did not start it, and again", async (fixture) => {
    for (const state of ["Stopped", "Running", "Paused", "Standby"] as const) {
      const driver = fixture.open();
      const instance = fixture.counting();
      await driver.create(instance);
      await bring(fixture, driver, instance, state);
      if ((await driver.inspect(instance)).state !== state) continue; // it lacks the feature
      const next = fixture.open();
      await next.adopt(instance);
      await next.delete(instance);
      assert.deepEqual(fixture.remains(instance), [], state);
      await next.delete(instance);
    }
  });

  check("stop() works on what is paused and on what sleeps", async (fixture) => {
    const driver = fixture.open();
    const instance = fixture.counting();
    await driver.create(instance);
    for (const state of ["Paused", "Standby"] as const) {
      await bring(fixture, driver, instance, state);
      await driver.stop(instance, NEVER);
      assert.equal((await driver.inspect(instance)).state, "Stopped", state);
    }
    await start(fixture, driver, instance);
    await driver.delete(instance);
  });

  // S2: what cannot be told is not called stopped, and nothing throws.
  check("inspect() says Unknown with a reason where it cannot tell, and delete() still works", async (fixture) => {
    const driver = fixture.open();
    const instance = fixture.counting();
    await driver.create(instance);
    await start(fixture, driver, instance);
    fixture.blind(instance);
    for (const reading of [await driver.inspect(instance), await fixture.open().adopt(instance)]) {
      assert.equal(reading.state, "Unknown");
      assert(reading.state === "Unknown" && reading.error.length > 0);
    }
    await driver.delete(instance);
    assert.deepEqual(fixture.remains(instance), []);
  });

  check("logs() tells log_not_found for a source that there is not", async (fixture) => {
    const driver = fixture.open();
    if (!driver.features.has("logs")) return;
    const instance = fixture.counting();
    await driver.create(instance);
    const read = async () => {
      for await (const _ of driver.logs!(instance, { source: "hypeman", tail: 1, follow: false, signal: NEVER }));
    };
    await assert.rejects(read, (error) => error instanceof DormouseError && error.code === "log_not_found");
    await driver.delete(instance);
  });

  check("stats() tells what is used while it runs", async (fixture) => {
    const driver = fixture.open();
    if (!driver.features.has("stats")) return;
    const instance = fixture.counting();
    await driver.create(instance);
    await start(fixture, driver, instance);
    const stats = await driver.stats!(instance);
    assert(stats.memory_rss_bytes > 0 && stats.memory_vms_bytes >= stats.memory_rss_bytes);
    for (const value of Object.values(stats)) assert(value >= 0);
    await driver.delete(instance);
  });
}

const SLEEPS = [["Paused", "pause", "resume"], ["Standby", "standby", "restore"]] as const;

async function start(fixture: DriverFixture, driver: Driver, instance: Instance): Promise<void> {
  const before = await fixture.count(instance);
  await driver.start(instance, NEVER);
  await until("it runs", async () => (await driver.inspect(instance)).state === "Running", 180_000);
  // A log may still hold the numbers of the run before: what counts is that there are new ones.
  if (before === 0) await counts(fixture, instance, 0);
}

async function bring(fixture: DriverFixture, driver: Driver, instance: Instance, state: State): Promise<void> {
  if (state === "Stopped") return;
  await start(fixture, driver, instance);
  const sleep = SLEEPS.find(([to]) => to === state)?.[1];
  if (sleep && driver.features.has(sleep)) await driver[sleep]!(instance, NEVER);
}

/** Waits until it has counted on; one that began anew would have to catch up first. */
async function counts(fixture: DriverFixture, instance: Instance, from: number): Promise<void> {
  await until(`it counts beyond ${from}`, async () => await fixture.count(instance) > from + 2, 180_000);
}
