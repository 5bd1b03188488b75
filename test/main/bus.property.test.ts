import assert from "node:assert/strict";
import { describe, it } from "node:test";
import fc from "fast-check";
import { HookBus, type Lagged } from "../../main.ts";
import "./vocabulary.ts";

/** One subscriber of a run, and all that happened to it; a number is an event, an object a marker. */
interface Subscriber {
  log: (number | Lagged)[];
  /** Positions it was subscribed for, in order. */
  owed: number[];
  running: number;
  undone: boolean;
  undo(): void;
}

const step = fc.oneof(
  { weight: 6, arbitrary: fc.record({ do: fc.constant("publish"), count: fc.integer({ min: 1, max: 9 }) }) },
  { weight: 3, arbitrary: fc.record({ do: fc.constant("tick"), count: fc.integer({ min: 1, max: 4 }) }) },
  { weight: 1, arbitrary: fc.record({ do: fc.constant("undo"), count: fc.nat(7) }) },
  { weight: 1, arbitrary: fc.record({ do: fc.constant("subscribe"), count: fc.nat(7) }) },
  { weight: 1, arbitrary: fc.record({ do: fc.constant("stats"), count: fc.constant(0) }) },
);
const behaviour = fc.record({
  buffer: fc.integer({ min: 1, max: 6 }),
  /** Microtasks that its handler takes; 0 is a synchronous handler. */
  takes: fc.nat(3),
  throws: fc.boolean(),
  /** What its handler does to the bus, one entry for each of its first calls. */
  acts: fc.array(
    fc.record({
      act: fc.constantFrom("none", "undo", "publish", "subscribe", "stats"),
      count: fc.integer({ min: 1, max: 8 }),
    }),
    { maxLength: 4 },
  ),
});

function checkOne({ log, owed, undone }: Subscriber): void {
  const told = log.flatMap((entry) =>
    typeof entry === "number" ? [entry] : Array.from({ length: entry.to - entry.from + 1 }, (_, i) => entry.from + i)
  );
  // In order, each exactly once, and all of it: but for what an undo cut off at the end.
  assert.deepEqual(told, undone ? owed.slice(0, told.length) : owed);
}

describe("Delivery", () => {
  it("publish() reaches each subscriber in order, loses nothing without an exact marker, and never after its undo", async () => {
    await fc.assert(
      fc.asyncProperty(fc.array(behaviour, { minLength: 1, maxLength: 8 }), fc.array(step), async (kinds, steps) => {
        const bus = new HookBus();
        const hooks = bus.view("test");
        const violations: string[] = [];
        const subscribers: Subscriber[] = [];
        let seq = 0;
        const publish = (count: number) => {
          for (let i = 0; i < count; i++) {
            seq++;
            for (const each of subscribers) if (!each.undone) each.owed.push(seq);
            hooks.publish("test:numbered", { seq });
          }
        };
        const act = (what: string, count: number) => {
          if (what === "undo") subscribers[count % subscribers.length].undo();
          else if (what === "publish") publish(count);
          else if (what === "subscribe" && subscribers.length < 20) subscribe(kinds[count % kinds.length]);
          else if (what === "stats") hooks.stats();
        };
        const subscribe = ({ buffer, takes, throws, acts }: typeof kinds[number]) => {
          let calls = 0;
          const self: Subscriber = { log: [], owed: [], running: 0, undone: false, undo: () => {} };
          const handle = (entry: number | Lagged) => {
            // Collected, as the bus would isolate an assertion that throws in a handler.
            if (self.undone) violations.push("called after its undo");
            if (self.running++ > 0) violations.push("called while it runs");
            self.log.push(typeof entry === "number" ? entry : { ...entry });
            const { act: what, count } = acts[calls++] ?? { act: "none", count: 0 };
            act(what, count);
            const end = () => {
              self.running--;
              if (throws) throw new Error("on purpose");
            };
            if (takes === 0) return end();
            return (async () => {
              for (let i = 0; i < takes; i++) await Promise.resolve();
              end();
            })();
          };
          const consumer = `consumer${subscribers.length}`;
          const undo = hooks.on("test:numbered", ({ seq }) => handle(seq), { buffer, consumer, lagged: handle });
          self.undo = () => {
            self.undone = true;
            undo[Symbol.dispose]();
          };
          subscribers.push(self);
        };
        kinds.forEach(subscribe);
        for (const { do: what, count } of steps) {
          if (what !== "tick") act(what, count);
          else for (let i = 0; i < count; i++) await Promise.resolve();
        }
        await bus.idle();
        assert.deepEqual(violations, []);
        subscribers.forEach(checkOne);
        const stats = new Map(bus.stats().map((each) => [each.consumer, each]));
        subscribers.forEach(({ log, undone }, i) => {
          const { deepest, dropped, errors, subscribers } = stats.get(`consumer${i}`)!;
          assert.deepEqual([deepest, subscribers], [0, undone ? 0 : 1]);
          // Handlers under way when they were undone fail after idle() has resolved, so they may be counted or not.
          const failures = kinds.length > i && kinds[i].throws ? log.length : 0;
          if (kinds.length > i) assert.ok(errors === failures || (undone && errors === failures - 1), "errors");
          const missed = log.reduce<number>((sum, e) => sum + (typeof e === "number" ? 0 : e.to - e.from + 1), 0);
          assert.ok(undone ? dropped >= missed : dropped === missed, "dropped");
        });
      }),
      { numRuns: 400 },
    );
  });
});

describe("guards and commit hooks", () => {
  const plan = fc.array(
    fc.record({ priority: fc.integer({ min: -3, max: 3 }), undoes: fc.option(fc.nat(9)), async: fc.boolean() }),
    { minLength: 1, maxLength: 10 },
  );

  it("ask() and apply() call by priority, then by age, those that are not undone, whoever undoes whom", async () => {
    await fc.assert(
      fc.asyncProperty(plan, fc.boolean(), async (handlers, guards) => {
        const hooks = new HookBus().view("test");
        const seen: string[] = [];
        const undone = new Set<number>();
        const undos: Disposable[] = handlers.map(({ priority, undoes, async }, i) => {
          const call = () => {
            assert.equal(undone.has(i), false, "called after its undo");
            seen.push(String(i));
            if (undoes === null) return;
            undone.add(undoes % handlers.length);
            undos[undoes % handlers.length][Symbol.dispose]();
          };
          if (!guards) return hooks.commit("test:commit", call, { priority });
          return hooks.guard("test:guard", async ? async () => call() : call, { priority });
        });
        const order = handlers.map((_, i) => i).sort((a, b) => handlers[b].priority - handlers[a].priority || a - b);
        const gone = new Set<number>();
        const expected = order.filter((i) => {
          const called = !gone.has(i);
          if (called && handlers[i].undoes !== null) gone.add(handlers[i].undoes % handlers.length);
          return called;
        });
        if (guards) await hooks.ask("test:guard", { seen });
        else hooks.apply("test:commit", { seen });
        assert.deepEqual(seen, expected.map(String));
      }),
      { numRuns: 300 },
    );
  });
});
