import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { definePlugin, type Instance, type Plugin } from "../../main.ts";
import { settle } from "../clock.ts";
import { temporaryFolder } from "../helpers.ts";
import { type Lease, PERSON, world } from "./world.ts";

/** More turns of the microtask queue than a stop has, from its first guard to its note. */
const TURNS = 120;

async function turns(n: number): Promise<void> {
  for (let i = 0; i < n; i++) await Promise.resolve();
}

// I24, R2, R4: a driver that answers at once makes a stop a chain of microtasks, so these are all the moments there are.
for (const via of ["stop", "standby"] as const) {
  test(`an acquire at any moment of a ${via} ends with a lease of a running instance`, async (t) => {
    const folder = temporaryFolder(t);
    let [moment, caught] = [0, 0];
    let acquired: Promise<Lease> | undefined;
    const ways = new Map<string, number>();
    const watching = definePlugin({
      name: "watching",
      setup(host) {
        host.hooks.guard(`before:${via}`, ({ origin }) => {
          if (origin.actor !== "lazy" || acquired) return;
          acquired = turns(moment).then(() => acquire("web", "1m"));
          return turns(10);
        }, { priority: 1_000 });
      },
    });
    const { instance, acquire, release, renew, clock, hypervisor, events, notes } = await world(t, {
      folder,
      plugins: [watching as Plugin],
    });
    const { id } = await instance("web", { enabled: true, idle_stop: "10s", via });
    for (moment = 0; moment < TURNS; moment++) {
      const [before, noted] = [events.length, notes.length];
      acquired = undefined;
      await clock.pass(10_000);
      const { lease, started } = await acquired!;
      const { state, transition } = hypervisor.find(id)!;
      assert.deepEqual([state, transition], ["Running", null], `after ${moment} turns`);
      await clock.pass(59_000);
      assert.equal(hypervisor.find(id)!.state, "Running", `a minute after ${moment} turns`);
      await renew("web", lease);
      const actions = events.slice(before).map(({ action, to }) => `${action} ${to}`).join(", ");
      ways.set(actions, (ways.get(actions) ?? 0) + 1);
      if (!started) caught++;
      const expected = started ? ["lazy_stop", "lazy_start"] : [];
      assert.deepEqual(notes.slice(noted).map(({ type }) => type), expected, `after ${moment} turns: ${actions}`);
      await release("web", lease);
    }
    // Some came before the point of no return, and some behind it.
    assert.ok(caught > 0 && caught < TURNS, [...ways].join("; "));
  });
}

const at = fc.nat(2);
const OP = fc.oneof(
  {
    weight: 6,
    arbitrary: fc.record({ op: fc.constant("acquire" as const), at, ttl: fc.integer({ min: 1, max: 30 }) }),
  },
  {
    weight: 3,
    arbitrary: fc.record({ op: fc.constantFrom("leave", "release", "renew", "sleep", "wake", "start"), at }),
  },
  {
    weight: 6,
    arbitrary: fc.record({ op: fc.constant("pass" as const), at, ms: fc.integer({ min: 1, max: 12_000 }) }),
  },
  { weight: 6, arbitrary: fc.record({ op: fc.constant("open" as const), at, turns: fc.nat(20) }) },
  { weight: 2, arbitrary: fc.record({ op: fc.constantFrom("slow", "fast", "sick", "well"), at }) },
);

test("whatever comes in between, who is given a lease has a running instance until its end", async (t) => {
  const counts = { granted: 0, left: 0, stops: 0, starts: 0, vetoed: 0 };
  await fc.assert(
    fc.asyncProperty(fc.array(OP, { maxLength: 120, size: "max" }), async (ops) => {
      const wrong: string[] = [];
      const held = new Map<string, { id: string; end: number }>();
      let sick = false;
      const checking = definePlugin({
        name: "checking",
        setup(host) {
          host.hooks.guard("wake:ready", () => {
            if (sick) throw new Error("not yet");
          });
          host.hooks.commit("instance:commit", ({ event: { from, to, action, actor, instance_id } }) => {
            if (from !== "Running" || to === "Running" || leasesOf(instance_id).length === 0) return;
            wrong.push(`${action} by ${actor} took it to ${to} under a lease`);
          });
        },
      });
      const made = await world(t, { plugins: [checking as Plugin] });
      const { clock, driver, hypervisor, events, notes, host } = made;
      const ids: string[] = [];
      for (const [i, via] of ["stop", "standby", "stop"].entries()) {
        const policy = { enabled: true, idle_stop: "5s", start_timeout: "1000h", via };
        ids.push((await made.instance(`i${i}`, policy)).id);
      }

      // A slow driver does nothing until it is told to go on.
      let slow = false;
      const waiting: (() => void)[] = [];
      const wait = (_instance: Instance, signal: AbortSignal) => {
        if (!slow) return;
        return new Promise<void>((resolve, reject) => {
          waiting.push(resolve);
          signal?.addEventListener("abort", () => reject(signal.reason), { once: true });
        });
      };
      for (const method of ["start", "stop", "standby", "restore"] as const) driver.script[method] = wait;

      const acquires: Promise<void>[] = [];
      const clients = new Map<AbortController, string>();
      const acquire = (id: string, ttl: number) => {
        const client = new AbortController();
        clients.set(client, id);
        const acquired = made.acquire(id, `${ttl}s`, client.signal).then(({ lease, expires_at }) => {
          counts.granted++;
          const instance = hypervisor.find(id)!;
          if (instance.state !== "Running" || instance.transition !== null) {
            wrong.push(`a lease of an instance in ${instance.state} (${instance.transition})`);
          }
          held.set(lease, { id, end: Date.parse(expires_at) });
        }, (error) => {
          if (client.signal.aborted) counts.left++;
          else wrong.push(`an acquire failed: ${error.code} ${error.message}`);
        });
        acquires.push(acquired.finally(() => clients.delete(client)));
      };
      const leasesOf = (id: string) => [...held].filter(([, each]) => each.id === id && each.end > clock.now());
      const refused = (error: { code: string }) => {
        if (error.code === "vetoed") counts.vetoed++;
        else if (!["invalid_state", "aborted"].includes(error.code)) wrong.push(`${error.code}`);
      };
      for (const each of ops) {
        const id = ids[each.at];
        const [lease, its] = leasesOf(id)[0] ?? [];
        if (each.op === "acquire") acquire(id, each.ttl);
        else if (each.op === "pass") await clock.pass(each.ms);
        else if (each.op === "slow" || each.op === "fast") slow = each.op === "slow";
        else if (each.op === "sick" || each.op === "well") sick = each.op === "sick";
        else if (each.op === "open") {
          waiting.splice(0).forEach((go) => go());
          await turns(each.turns);
        } else if (each.op === "leave") [...clients].find(([, to]) => to === id)?.[0].abort(new Error("left"));
        else if (each.op === "sleep") {
          void hypervisor.standby(id, { actor: "auto-standby", cause: "idle" }).catch(refused);
        } else if (each.op === "wake") void hypervisor.restore(id, { actor: "wake", cause: "port" }).catch(refused);
        else if (each.op === "start") void hypervisor.start(id, PERSON).catch(refused);
        else if (lease && each.op === "release") {
          held.delete(lease);
          await made.release(id, lease);
        } else if (lease && its) its.end = Date.parse((await made.renew(id, lease)).expires_at);
      }
      slow = sick = false;
      for (let n = 0; n < 10; n++) {
        waiting.splice(0).forEach((go) => go());
        await clock.pass(500);
      }
      await Promise.all(acquires);
      const known = ids.reduce((sum, id) => sum + leasesOf(id).length, 0);
      assert.deepEqual([wrong, host.use("lazy").stats().leases], [[], known], "there is no lease that nobody knows of");
      await clock.pass(60_000);
      assert.deepEqual(wrong, []);
      assert.ok(hypervisor.list().every(({ state }) => state === "Stopped" || state === "Standby"), "all are put away");
      const [stops, starts] = [["stop", "standby"], ["start", "restore"]].map((actions) =>
        events.filter(({ action, actor }) => actor === "lazy" && actions.includes(action)).length
      );
      const noted = (type: string) => notes.filter((note) => note.type === type).length;
      assert.deepEqual([noted("lazy_stop"), noted("lazy_start")], [stops, starts]);
      counts.stops += stops;
      counts.starts += starts;
      await settle();
      await host.close();
    }),
    { numRuns: 60 },
  );
  console.log(`seen: ${JSON.stringify(counts)}`);
  assert.ok(Object.values(counts).every((count) => count > 0), JSON.stringify(counts));
});
