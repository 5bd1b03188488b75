import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { definePlugin, type Instance, type Plugin } from "../../main.ts";
import { settle } from "../clock.ts";
import { flow, world } from "../conntrack-standby/world.ts";
import { capturedLogs, until } from "../helpers.ts";
import { ORIGIN, registryHost, type ScriptedDriver } from "../hypervisor/scripted.ts";
import { directPlugin } from "./direct.ts";
import { Machines, talk, wakeWorld } from "./world.ts";

/** The way of a standby, in order; `asleep` is past the driver's point of no return. */
const WAY = ["early guard", "late guard", "last guard", "begun", "driver", "asleep", "committed", "told"] as const;
const POINTS = ["before", ...WAY, "after"] as const;
type Point = (typeof POINTS)[number];

/** Calls what a test has put at a point, once; the standby waits there for what it returns. */
class Way {
  readonly #calls = new Map<Point, () => void | Promise<void>>();

  put(point: Point, call: () => void | Promise<void>): void {
    const before = this.#calls.get(point);
    this.#calls.set(point, before ? () => Promise.all([before(), call()]).then(() => {}) : call);
  }
  clear(): void {
    this.#calls.clear();
  }
  async reach(point: Point): Promise<void> {
    const call = this.#calls.get(point);
    this.#calls.delete(point);
    await call?.();
  }

  /** Tells of the guards, of both commits right after them, and of the event. */
  get plugin(): Plugin {
    return definePlugin({
      name: "way",
      setup: ({ hooks }) => {
        // Those of the plugins under test are at 0 and at the lowest safe integer.
        const guards = { "early guard": 50, "late guard": -100, "last guard": Number.MIN_SAFE_INTEGER - 1 } as const;
        for (const [point, priority] of Object.entries(guards)) {
          hooks.guard("before:standby", () => this.reach(point as Point), { priority });
        }
        hooks.commit("instance:commit", ({ event, after }) => {
          if (after?.transition === "standby") queueMicrotask(() => void this.reach("begun"));
          if (event.action === "standby") queueMicrotask(() => void this.reach("committed"));
        });
        hooks.on("instance:event", ({ action }) => action === "standby" ? this.reach("told") : undefined);
      },
    }) as Plugin;
  }

  /** A standby that can be aborted up to where it is `down`, and from there on ends asleep. */
  drive(driver: ScriptedDriver, down: (instance: Instance) => void | Promise<void> = () => {}): void {
    driver.standby = async (instance, signal) => {
      driver.calls.push("standby");
      await this.reach("driver");
      signal.throwIfAborted();
      await down(instance);
      driver.machines.set(instance.id, { state: "Standby" });
      await this.reach("asleep");
    };
  }
}

const CASE = fc.record({
  by: fc.constantFrom("idle" as const, "person" as const),
  point: fc.constantFrom(...POINTS),
  /** Turns of the event loop from the point to the connection, and whether the standby waits for it. */
  turns: fc.nat(4),
  waits: fc.boolean(),
  heard: fc.boolean(),
  tcp: fc.constantFrom("SYN_SENT", "SYN_RECV", "ESTABLISHED"),
  meanwhile: fc.option(
    fc.record({ what: fc.constantFrom("restore", "stop", "standby"), when: fc.constantFrom(...POINTS) }),
    { freq: 2 },
  ),
});

// R1, R2, R4, R5, R7, R8, I3, I4: wherever it meets the standby, whoever asked for that, and whoever else asks for what.
test("a connection that the kernel sees at any point of a standby is never stranded (property)", async (t) => {
  capturedLogs(t);
  const way = new Way();
  const { hypervisor, driver, clock, kernel, instance } = await world(t, { plugins: [directPlugin, way.plugin] });
  way.drive(driver);
  const met = new Map<Point, number>();
  let port = 0;
  await fc.assert(
    fc.asyncProperty(CASE, async ({ by, point, turns, waits, heard, tcp, meanwhile }) => {
      const { id, network } = await instance(`i${++port}`);
      const knock = flow({ destination: network.ip!, source_port: port, state: tcp });
      let early = false;
      const asked: Promise<unknown>[] = [];
      let arrival: Promise<void> | undefined;
      const arrive = () =>
        arrival ??= settle(turns).then(() => {
          // One that is there before the way is changed is one that a person's standby knows of, and means.
          early = ["before", "early guard", "late guard"].includes(point) && hypervisor.find(id)!.state === "Running";
          met.set(point, (met.get(point) ?? 0) + 1);
          kernel.deaf = !heard;
          kernel.set(knock);
          kernel.deaf = false;
        });
      let done = false;
      const act = () => {
        if (done || !meanwhile) return;
        done = true;
        const what = meanwhile.what as "restore" | "stop" | "standby";
        asked.push(hypervisor[what](id, ORIGIN).catch((error) => error));
      };
      way.put(point, () => waits ? arrive().then(() => settle(2)) : void arrive());
      if (meanwhile) way.put(meanwhile.when, act);
      await way.reach("before");
      const sleeping = hypervisor.find(id)!.state === "Running" && by === "person"
        ? hypervisor.standby(id, ORIGIN).catch((error) => error)
        : clock.pass(10_000);
      await sleeping;
      await settle(8);
      // Also where what else was asked for has kept it from getting that far.
      await way.reach("after");
      await arrive();
      act();
      const outcomes = await Promise.all(asked);
      await settle(16);
      const state = () => hypervisor.find(id)!.state;
      const stopped = meanwhile?.what === "stop";
      const meant = meanwhile?.what === "standby" || (by === "person" && early);
      if (heard && !stopped && !meant) assert.equal(state(), "Running");
      if (meanwhile?.what === "restore") assert.equal(outcomes[0] instanceof Error, false, String(outcomes[0]));
      kernel.lose();
      kernel.connect();
      await settle(16);
      assert.ok(state() === "Running" || (stopped && state() === "Stopped"), `${state()} after the dump`);
      way.clear();
      kernel.destroy(knock);
      await hypervisor.delete(id, ORIGIN);
    }),
    { numRuns: 600 },
  );
  for (const point of POINTS) assert.ok(met.get(point)! > 5, `"${point}" was met ${met.get(point)} times`);
});

const LISTENED = fc.record({
  point: fc.constantFrom(...POINTS),
  turns: fc.nat(4),
  meanwhile: fc.option(fc.constantFrom("restore" as const, "stop" as const, "client" as const), { freq: 3 }),
});

// R1, R2, R5, R7, R8, W3: the same for an instance of which nothing is left while it sleeps.
test("a connection to a published port at any point of a standby is never refused (property)", async (t) => {
  capturedLogs(t);
  const way = new Way();
  const driver = new Machines();
  way.drive(driver, ({ id }) => driver.close(id));
  const { make, hypervisor, wake } = await wakeWorld(t, {
    driver,
    plugins: [way.plugin],
    table: { start_on_demand: true },
  });
  const { id, port } = await make("web");
  let run = 0;
  await fc.assert(
    fc.asyncProperty(LISTENED, async ({ point, turns, meanwhile }) => {
      const text = `client ${++run}`;
      let answer: Promise<string> | undefined;
      const others: Promise<unknown>[] = [];
      const arrive = async () => {
        if (answer) return;
        await settle(turns);
        const { connections } = wake.stats();
        let answered = false;
        answer = talk(port, text).finally(() => answered = true);
        if (meanwhile === "client") others.push(talk(port, text).then((other) => assert.equal(other, text)));
        else if (meanwhile) others.push(hypervisor[meanwhile](id, ORIGIN).catch((error) => error));
        await until("it is here", () => answered || (wake.stats().connections > connections && wake.stats().held > 0));
        // Not yet on its way to sleep, it serves: what is under way when it goes, goes with it.
        if (["before", "early guard", "late guard"].includes(point)) await Promise.all([answer, ...others]);
      };
      way.put(point, arrive);
      await way.reach("before");
      await hypervisor.standby(id, ORIGIN).catch(() => {}); // overtaken, as a rule
      await way.reach("after");
      await arrive();
      const said = await answer!;
      if (meanwhile !== "stop") assert.equal(said, text);
      await Promise.all(others);
      way.clear();
      // A stop ends the connections that it finds, and may make the wake fail; but not for long.
      if (meanwhile === "stop") await until("it is served again", async () => await talk(port, "again") === "again");
      else assert.equal(await talk(port, "again"), "again");
      assert.equal(hypervisor.find(id)?.state, "Running");
    }),
    { numRuns: 60, endOnFailure: true },
  );
  assert.equal(wake.stats().held, 0);
});

// R13: nobody is refused for a state that was, and nobody restores twice.
test("restores at once, also in the middle of a standby, are one restore and no conflict", async (t) => {
  const { hypervisor, driver, events } = await registryHost(t);
  const { id } = await hypervisor.create({ name: "web", image: "x" }, ORIGIN);
  for (const when of ["asleep", "on the way"] as const) {
    const sleeping = hypervisor.standby(id, ORIGIN).catch((error) => error.code);
    if (when === "asleep") await sleeping;
    driver.calls.length = 0;
    const restored = await Promise.all(Array.from({ length: 20 }, () => hypervisor.restore(id, ORIGIN)));
    await sleeping;
    assert.deepEqual(restored.map(({ state }) => state), restored.map(() => "Running"));
    assert.ok(driver.calls.filter((call) => call === "restore").length <= (when === "asleep" ? 1 : 0));
  }
  assert.equal(events.filter(({ action }) => action === "restore").length, 1);
});
