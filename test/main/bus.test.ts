import assert from "node:assert/strict";
import { describe, it } from "node:test";
import { DormouseError, HookBus, type Lagged, Veto } from "../../main.ts";
import { Closers } from "../../plugins/shared/closers.ts";
import "./vocabulary.ts";

const failsWith = (code: string, message: string | RegExp) => (error: unknown) => {
  assert.ok(error instanceof DormouseError, String(error));
  assert.equal(error.code, code);
  if (typeof message === "string") assert.equal(error.message, message);
  else assert.match(error.message, message);
  return true;
};
const statsOf = (bus: HookBus, consumer: string) => bus.stats().find((each) => each.consumer === consumer);

describe("events", () => {
  it("publish() does not call handlers when it runs, but soon and in order", async () => {
    const bus = new HookBus();
    const hooks = bus.view("test");
    const seen: string[] = [];
    hooks.on("test:event", (value) => void seen.push(`a${value}`));
    hooks.on("test:event", async (value) => void seen.push(`b${value}`));
    hooks.publish("test:event", 1);
    hooks.publish("test:event", 2);
    assert.equal(seen.length, 0);
    await bus.idle();
    assert.deepEqual(seen.filter((each) => each.startsWith("a")), ["a1", "a2"]);
    assert.deepEqual(seen.filter((each) => each.startsWith("b")), ["b1", "b2"]);
  });

  it("publish() isolates and counts a handler that throws, rejects or returns anything", async () => {
    const bus = new HookBus();
    const hooks = bus.view("test");
    const seen: number[] = [];
    const broken = [
      () => {
        throw new Error("sync");
      },
      () => Promise.reject(new Error("async")),
      () => {
        throw undefined;
      },
    ];
    broken.forEach((handler, i) => hooks.on("test:event", handler, { consumer: `broken${i}` }));
    // What `(value) => seen.push(value)` returns is a number, which is neither a failure nor a promise.
    hooks.on("test:event", (value) => seen.push(value) as unknown as void, { consumer: "counting" });
    const thenable = (value: number) => ({ then: (done: () => void) => (seen.push(-value), done()) });
    hooks.on("test:event", (value) => thenable(value) as unknown as void, { consumer: "thenable" });
    for (const value of [1, 2]) hooks.publish("test:event", value);
    await bus.idle();
    assert.deepEqual(seen.toSorted(), [-1, -2, 1, 2]);
    for (const i of [0, 1, 2]) assert.equal(statsOf(bus, `broken${i}`)?.errors, 2, `broken${i}`);
    for (const consumer of ["counting", "thenable"]) assert.equal(statsOf(bus, consumer)?.errors, 0, consumer);
  });

  // E2: what did not fit is named by a marker instead of being only counted.
  it("on() gets one marker in the place of what it missed when its queue is full", async () => {
    const bus = new HookBus();
    const hooks = bus.view("test");
    const seen: unknown[] = [];
    const slow = Promise.withResolvers<void>();
    hooks.on("test:numbered", ({ seq }) => (seen.push(seq), seq === 7 ? slow.promise : undefined), {
      buffer: 2,
      lagged: (gap: Lagged) => void seen.push({ ...gap }),
    });
    hooks.publish("test:numbered", { seq: 7 });
    await Promise.resolve();
    for (let seq = 8; seq < 20; seq++) hooks.publish("test:numbered", { seq });
    assert.deepEqual(statsOf(bus, "test"), {
      hook: "test:numbered",
      consumer: "test",
      subscribers: 1,
      deepest: 3,
      dropped: 10,
      errors: 0,
    });
    slow.resolve();
    await bus.idle();
    hooks.publish("test:numbered", { seq: 20 });
    await bus.idle();
    assert.deepEqual(seen, [7, 8, 9, { from: 10, to: 19 }, 20]);
  });

  it("on() counts positions itself when the payload has no seq, and keeps its counts over a new subscription", async () => {
    const bus = new HookBus({ buffer: 1 });
    const hooks = bus.view("test");
    const gaps: Lagged[] = [];
    const subscribe = () =>
      hooks.on("test:event", () => {}, { consumer: "c", lagged: (gap) => void gaps.push({ ...gap }) });
    const first = subscribe();
    for (let i = 0; i < 4; i++) hooks.publish("test:event", 0);
    await bus.idle();
    first[Symbol.dispose]();
    assert.equal(statsOf(bus, "c")?.subscribers, 0);
    using _second = subscribe();
    for (let i = 0; i < 3; i++) hooks.publish("test:event", 0);
    await bus.idle();
    assert.deepEqual(gaps, [{ from: 2, to: 4 }, { from: 6, to: 7 }]);
    assert.deepEqual([statsOf(bus, "c")?.subscribers, statsOf(bus, "c")?.dropped], [1, 5]);
  });

  it("on() refuses a buffer when it is not a whole number above zero", () => {
    for (const buffer of [0, -1, 1.5, NaN, Infinity]) {
      const hooks = new HookBus().view("test");
      assert.throws(() => hooks.on("test:event", () => {}, { buffer }), RangeError, String(buffer));
    }
  });

  // S5: an undo in the middle of a delivery, by whomever, neither throws nor is followed by a call.
  it("on() is not called again when it was undone by itself or another while being called", async () => {
    const bus = new HookBus();
    const hooks = bus.view("test");
    const seen: string[] = [];
    const self = hooks.on("test:event", (value) => {
      seen.push(`self${value}`);
      self[Symbol.dispose]();
      hooks.on("test:event", (later) => void seen.push(`new${later}`));
    });
    hooks.on("test:event", (value) => {
      seen.push(`killer${value}`);
      victim[Symbol.dispose]();
      victim[Symbol.dispose]();
    });
    const victim = hooks.on("test:event", (value) => void seen.push(`victim${value}`));
    hooks.publish("test:event", 1);
    hooks.publish("test:event", 2);
    await bus.idle();
    hooks.publish("test:event", 3);
    await bus.idle();
    assert.deepEqual(seen, ["self1", "killer1", "killer2", "killer3", "new3"]);
  });

  it("idle() waits for what handlers publish themselves", async () => {
    const bus = new HookBus();
    const hooks = bus.view("test");
    const seen: unknown[] = [];
    hooks.on("test:numbered", async ({ seq }) => {
      for (let i = 0; i < 20; i++) await Promise.resolve();
      seen.push(seq);
    });
    hooks.on("test:event", async (value) => {
      await Promise.resolve();
      if (value > 0) hooks.publish("test:event", value - 1);
      else hooks.publish("test:numbered", { seq: 5 });
    });
    hooks.publish("test:event", 3);
    await bus.idle();
    assert.deepEqual(seen, [5]);
  });

  it("dispose() leaves nothing behind in the plugin when subscriptions come and go", () => {
    const closers = new Closers();
    const bus = new HookBus();
    const hooks = bus.view("test", closers);
    for (let i = 0; i < 1000; i++) {
      using _event = hooks.on("test:event", () => {});
      using _guard = hooks.guard("test:guard", () => {});
      using _commit = hooks.commit("test:commit", () => {});
      assert.deepEqual([closers.size, bus.commits.size], [2, 1]);
    }
    assert.deepEqual([closers.size, bus.commits.size], [0, 0]);
  });
});

describe("guards", () => {
  it("ask() runs guards one after the other, higher priority first, equals as they came", async () => {
    const hooks = new HookBus().view("test");
    for (const [name, priority] of [["c", 0], ["a", 10], ["d", 0], ["e", -1], ["b", 5]] as const) {
      hooks.guard("test:guard", async ({ seen }) => {
        seen.push(`${name} begins`);
        await Promise.resolve();
        seen.push(`${name} ends`);
      }, { priority });
    }
    const seen: string[] = [];
    await hooks.ask("test:guard", { seen });
    assert.deepEqual(seen, ["a", "b", "c", "d", "e"].flatMap((name) => [`${name} begins`, `${name} ends`]));
  });

  it("ask() refuses with the code and reason when a guard vetoes, sync or async, ours or look-alike", async () => {
    const lookAlike = Object.assign(new Error("busy"), { name: "Veto", code: "still_busy" });
    for (const veto of [new Veto("still_busy", "busy"), lookAlike]) {
      for (
        const guard of [() => Promise.reject(veto), () => {
          throw veto;
        }]
      ) {
        const bus = new HookBus();
        let later = false;
        bus.view("nurse").guard("test:guard", guard);
        bus.view("late").guard("test:guard", () => void (later = true));
        const asked = bus.view("asker").ask("test:guard", { seen: [] });
        await assert.rejects(asked, (error: DormouseError) => {
          assert.deepEqual(error.details, { plugin: "nurse", code: "still_busy", reason: "busy" });
          assert.equal(error.cause, veto);
          return failsWith("vetoed", 'Refused by plugin "nurse": busy')(error);
        });
        assert.equal(later, false);
      }
    }
  });

  it("ask() fails with guard_failed when a guard throws anything else, but keeps a code of ours", async () => {
    const cases: [unknown, string, string][] = [
      [new Error("boom"), "guard_failed", 'Guard "test:guard" of plugin "p" failed: boom'],
      ["text", "guard_failed", 'Guard "test:guard" of plugin "p" failed: text'],
      [undefined, "guard_failed", 'Guard "test:guard" of plugin "p" failed: undefined'],
      [new DormouseError("insufficient_resources", "No memory"), "insufficient_resources", "No memory"],
    ];
    for (const [thrown, code, message] of cases) {
      const hooks = new HookBus().view("p");
      hooks.guard("test:guard", () => Promise.reject(thrown));
      await assert.rejects(hooks.ask("test:guard", { seen: [] }), failsWith(code, message));
    }
  });

  it("ask() fails when a guard is past its own deadline or the bus's", async (t) => {
    t.mock.timers.enable({ apis: ["setTimeout"] });
    t.after(() => t.mock.timers.reset());
    for (const [options, ms] of [[{}, 500], [{ timeout: 20 }, 20]] as const) {
      const hooks = new HookBus({ timeout: 500 }).view("slow");
      hooks.guard("test:guard", () => new Promise(() => {}), options);
      const asked = hooks.ask("test:guard", { seen: [] });
      const late = assert.rejects(
        asked,
        failsWith("guard_failed", `Guard "test:guard" of plugin "slow" failed: it ran past its deadline of ${ms} ms`),
      );
      t.mock.timers.tick(ms);
      await late;
    }
  });

  it("ask() passes over a guard when an earlier one undid it, and does not run one that was added meanwhile", async () => {
    const hooks = new HookBus().view("test");
    const first = hooks.guard("test:guard", ({ seen }) => {
      seen.push("first");
      first[Symbol.dispose]();
      second[Symbol.dispose]();
      hooks.guard("test:guard", () => void seen.push("new"));
    });
    const second = hooks.guard("test:guard", ({ seen }) => void seen.push("second"));
    const seen: string[] = [];
    await hooks.ask("test:guard", { seen });
    assert.deepEqual(seen, ["first"]);
    await hooks.ask("test:guard", { seen });
    assert.deepEqual(seen, ["first", "new"]);
  });
});

describe("commit hooks", () => {
  it("apply() runs them at once by priority, and what one throws goes to the caller", () => {
    const hooks = new HookBus().view("test");
    const seen: string[] = [];
    hooks.commit("test:commit", () => seen.push("low") as unknown as void, { priority: -1 });
    const high = hooks.commit("test:commit", () => seen.push("high") as unknown as void, { priority: 1 });
    hooks.apply("test:commit", { seen });
    assert.deepEqual(seen.splice(0), ["high", "low"]);
    high[Symbol.dispose]();
    const boom = new Error("boom");
    hooks.commit("test:commit", () => {
      throw boom;
    });
    assert.throws(() => hooks.apply("test:commit", { seen }), (error) => error === boom);
    assert.deepEqual(seen, []);
  });

  it("apply() refuses a hook when it returns a promise, also one that rejects", () => {
    for (const hook of [async () => {}, () => Promise.reject(new Error("later"))]) {
      const hooks = new HookBus().view("p");
      hooks.commit("test:commit", hook);
      const message = 'Commit hook "test:commit" of plugin "p" returned a promise';
      assert.throws(() => hooks.apply("test:commit", { seen: [] }), { name: "TypeError", message });
    }
  });

  it("apply() passes over a hook when an earlier one undid it", () => {
    const hooks = new HookBus().view("test");
    hooks.commit("test:commit", () => second[Symbol.dispose]());
    const second = hooks.commit("test:commit", ({ seen }) => void seen.push("second"));
    const seen: string[] = [];
    hooks.apply("test:commit", { seen });
    assert.deepEqual(seen, []);
  });
});
