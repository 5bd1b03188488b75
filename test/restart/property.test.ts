import assert from "node:assert/strict";
import { test, type TestContext } from "node:test";
import fc from "fast-check";
import { type CommitContext, definePlugin, DormouseError, type Reading } from "../../main.ts";
import { settle } from "../clock.ts";
import { capturedLogs } from "../helpers.ts";
import { ORIGIN, type World, world } from "./world.ts";

const SLOTS = 3;
const MINUTE = 60_000;

const slot = fc.nat(SLOTS - 1);
// How many turns of the event loop pass before the next operation: often none, so that they meet in the middle.
const turns = fc.constantFrom(0, 0, 0, 1, 2, 5);
const POLICY = fc.oneof(
  fc.constant(null),
  fc.record({
    policy: fc.constantFrom("never", "always", "on_failure"),
    max_attempts: fc.nat(3),
    on_unhealthy: fc.boolean(),
    backoff: fc.constantFrom("1s", "5s"),
    // Longer than any run of the property: what is counted is counted to the end.
    stable_after: fc.constant("1000h"),
  }),
);
const OP = fc.oneof(
  {
    weight: 6,
    arbitrary: fc.record({ op: fc.constant("crash" as const), code: fc.constantFrom(0, 1, 137, null), slot }),
  },
  {
    weight: 9,
    arbitrary: fc.record({ op: fc.constantFrom("stop", "start", "standby", "restore", "delete", "fulfilled"), slot }),
  },
  { weight: 3, arbitrary: fc.record({ op: fc.constant("policy" as const), policy: POLICY, slot }) },
  { weight: 3, arbitrary: fc.record({ op: fc.constantFrom("unhealthy", "healthy", "unknown", "look"), slot }) },
  { weight: 4, arbitrary: fc.record({ op: fc.constant("pass" as const), ms: fc.nat(12_000) }) },
  { weight: 1, arbitrary: fc.record({ op: fc.constant("fail" as const), action: fc.constantFrom("start", "stop") }) },
  { weight: 1, arbitrary: fc.record({ op: fc.constant("host" as const), code: fc.constantFrom(0, 1, null), slot }) },
);
const CASE = fc.record({
  policies: fc.array(POLICY, { minLength: SLOTS, maxLength: SLOTS }),
  /** Turns of the event loop that the driver takes, call by call. */
  pace: fc.array(fc.nat(4), { minLength: 1, maxLength: 20 }),
  luck: fc.array(fc.double({ min: 0, max: 1, noNaN: true }), { minLength: 1, maxLength: 20 }),
  ops: fc.array(fc.tuple(OP, turns), { maxLength: 80, size: "max" }),
});

/** What a test knows of an instance by what it has asked for itself. */
interface Known {
  /** A stop was answered, and no start was asked for since. */
  stopped: boolean;
  /** A stop was asked for, and no start that was begun since. */
  unwanted: boolean;
  /** How many starts and stops were asked for. */
  starts: number;
  stops: number;
  /** Attempts since somebody started it or changed its policy, at least: asking for a start of what runs may count. */
  attempts: number;
  /** And at most. */
  most: number;
  /** It was stopped to be started again. */
  replaced: boolean;
}

class Story {
  world!: World;
  readonly known = new Map<string, Known>();
  readonly broken: string[] = [];
  readonly pending = new Set<Promise<unknown>>();
  readonly counts = { restarts: 0, stops: 0, hosts: 0 };
  ids: (string | undefined)[] = [];

  /** Sees each change in its transaction, before anybody can be told of it. */
  readonly watcher = definePlugin({
    name: "watcher",
    requires: ["hypervisor"],
    setup: ({ hooks }) => {
      hooks.commit("instance:commit", (context) => this.#see(context));
      hooks.guard("action:fulfilled", ({ action, instance, origin }) => {
        if (action === "start" && origin.actor !== "restart") this.of(instance.id).attempts = 0;
      });
    },
  });

  of(id: string): Known {
    let known = this.known.get(id);
    if (!known) {
      known = { stopped: false, unwanted: false, starts: 0, stops: 0, attempts: 0, most: 0, replaced: false };
      this.known.set(id, known);
    }
    return known;
  }

  /** Asks for something, and does not wait for it. */
  ask(work: Promise<unknown>, done?: () => void): void {
    const settled = work.then(done, () => {}).finally(() => this.pending.delete(settled));
    this.pending.add(settled);
  }

  #see({ event, before, after }: CommitContext): void {
    if (!before || !after) return;
    const known = this.of(after.id);
    const begun = after.transition === before.transition ? null : after.transition;
    const ours = event.actor === "restart";
    if (begun === "start" && !ours) known.attempts = known.most = 0;
    const policies = [before, after].map(({ policies }) => JSON.stringify(policies.restart_policy));
    if (policies[0] !== policies[1]) known.attempts = known.most = 0;
    if (before.transition === "stop" && after.state !== "Stopped") known.replaced = false;
    if (!ours || (begun !== "start" && begun !== "stop")) return;
    const from = begun === "start" ? "Stopped" : "Running";
    if (before.state !== from) this.broken.push(`${begun} from ${before.state}`);
    if (known.stopped) this.broken.push(`${begun} after a stop was answered`);
    if (begun === "start") this.counts.restarts++;
    if (begun === "stop" || !known.replaced) {
      known.attempts++;
      known.most++;
    }
    known.replaced = begun === "stop";
    const { max_attempts = 0 } = after.policies.restart_policy as { max_attempts?: number } ?? {};
    if (max_attempts > 0 && known.attempts > max_attempts) {
      this.broken.push(`attempt ${known.attempts} of ${max_attempts}`);
    }
  }
}

async function play(
  t: TestContext,
  { policies, pace, luck, ops }: typeof CASE extends fc.Arbitrary<infer C> ? C : never,
) {
  const story = new Story();
  let [paced, drawn] = [0, 0];
  let w = story.world = await world(t, {
    random: () => luck[drawn++ % luck.length],
    plugins: [story.watcher] as never[],
    table: { max_concurrent: 2 },
  });
  const { driver, clinic, clock } = w;
  for (const method of ["start", "stop", "standby", "restore", "inspect"] as const) {
    driver.script[method] = () => settle(pace[paced++ % pace.length]);
  }
  const find = (i: number) => w.hypervisor.find(story.ids[i] ?? "");
  const create = async (i: number, policy: unknown) => {
    const restart_policy = policy === null ? {} : { restart_policy: policy };
    const created = w.hypervisor.create({ name: `i${i}`, image: "any", ...restart_policy }, ORIGIN);
    story.ids[i] = await created.then(({ id }) => id, () => undefined);
  };
  const end = (id: string, exit_code: number | null) => {
    const reading = driver.machines.get(id);
    if (!reading || reading.state === "Stopped") return;
    driver.machines.set(id, { state: "Stopped", exit_code, exit_message: "gone" });
  };
  for (let i = 0; i < SLOTS; i++) await create(i, policies[i]);

  for (const [each, wait] of ops) {
    const instance = "slot" in each ? find(each.slot) : undefined;
    const id = instance?.id ?? "";
    if (each.op === "pass") await clock.pass(each.ms);
    else if (each.op === "fail") {
      const action = each.action as "start" | "stop";
      const before = driver.script[action]!;
      driver.script[action] = () => {
        driver.script[action] = before;
        throw new Error("broken");
      };
    } else if (each.op === "host") {
      await Promise.all(story.pending);
      story.counts.hosts++;
      w = story.world = await w.again(async () => {
        if (id !== "") end(id, each.code);
        await clock.pass(3_000);
      });
      for (const stored of w.hypervisor.list()) story.of(stored.id);
    } else if (!instance) {
      if ("slot" in each && story.pending.size === 0) await create(each.slot, policies[each.slot]);
    } else if (each.op === "crash") {
      end(id, each.code);
      w.hypervisor.changed(id, "exit");
    } else if (each.op === "unknown") {
      const before = driver.machines.get(id) as Reading;
      driver.machines.set(id, { state: "Unknown", error: "no answer" });
      w.hypervisor.changed(id, "look");
      await settle(wait + 2);
      if (driver.machines.get(id)?.state === "Unknown") driver.machines.set(id, before);
    } else if (each.op === "look") w.hypervisor.changed(id, "look");
    else if (each.op === "unhealthy" || each.op === "healthy") await clinic.say(instance, each.op);
    else if (each.op === "policy") story.ask(w.hypervisor.update(id, { restart_policy: each.policy }, ORIGIN));
    else if (each.op === "stop" || each.op === "fulfilled") {
      if (each.op === "fulfilled" && instance.state !== "Stopped") continue;
      const known = story.of(id);
      const { starts } = known;
      Object.assign(known, { unwanted: true, stops: known.stops + 1 });
      story.ask(w.hypervisor.stop(id, ORIGIN), () => {
        story.counts.stops++;
        if (known.starts === starts) known.stopped = true;
      });
    } else if (each.op === "start") {
      const known = story.of(id);
      const { stops } = known;
      Object.assign(known, { stopped: false, starts: known.starts + 1 });
      const wanted = () => {
        if (known.stops === stops) known.unwanted = false;
      };
      // One that was begun and failed says so too; one that was refused does not.
      const begun = (error: unknown) => error instanceof DormouseError && error.code === "driver_failed" && wanted();
      story.ask(w.hypervisor.start(id, ORIGIN).then(wanted, begun));
    } else story.ask(w.hypervisor[each.op as "standby" | "restore" | "delete"](id, ORIGIN));
    await settle(wait);
    assert.deepEqual(story.broken, []);
  }

  // All is well from here on, and whatever is due happens.
  for (const method of ["start", "stop"] as const) driver.script[method] = () => settle(1);
  for (let round = 0; round < 5; round++) {
    await Promise.all(story.pending);
    for (const instance of w.hypervisor.list()) {
      if (clinic.stateOf(instance) === "unhealthy") await clinic.say(instance, "healthy");
      if (driver.machines.get(instance.id)?.state === "Unknown") end(instance.id, 1);
      w.hypervisor.changed(instance.id, "look");
    }
    await clock.pass(10 * MINUTE);
  }
  assert.deepEqual(story.broken, []);
  for (const instance of w.hypervisor.list()) {
    const { state, exit_code, policies: { restart_policy } } = instance;
    const policy = restart_policy as { policy: string; max_attempts: number } | undefined;
    const { unwanted, most } = story.of(instance.id);
    const spent = policy && policy.max_attempts > 0 && most >= policy.max_attempts;
    const completed = policy?.policy === "on_failure" && exit_code === 0;
    if (state !== "Stopped" || !policy || unwanted || spent || completed) continue;
    assert.fail(`${instance.name} is Stopped: ${JSON.stringify([policy, w.status(instance.id), instance])}`);
  }
  await w.host.close();
  assert.equal(clock.timers, 0);
  return story.counts;
}

// H4, H5, H6, H9, S10: over the real registry and store, with everything in the middle of everything.
test("nobody's stop is undone, nothing starts but from Stopped, and all that should run does, within its budget", {
  timeout: 900_000,
}, async (t) => {
  capturedLogs(t);
  const total = { restarts: 0, stops: 0, hosts: 0 };
  await fc.assert(
    fc.asyncProperty(CASE, async (given) => {
      const counts = await play(t, given);
      for (const key of ["restarts", "stops", "hosts"] as const) total[key] += counts[key];
    }),
    { numRuns: 100 },
  );
  assert.ok(total.restarts > 20 && total.stops > 50 && total.hosts > 20, JSON.stringify(total));
});
