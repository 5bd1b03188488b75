import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import type { Flow } from "../../main.ts";
import { Tracker } from "../../plugins/conntrack-standby/tracker.ts";
import { flow } from "./world.ts";

const IDLE = 10_000;
const HALF_OPEN = 20_000;
const HOLD = 15_000;
const OVER = ["TIME_WAIT", "CLOSE", "NONE"];
const OPTIONS = {
  minAwake: 1_000,
  halfOpenMaxAge: HALF_OPEN,
  retryBackoff: 1_000,
  flap: { cycles: 3, window: 60_000, backoff: 5_000, backoffMax: 20_000 },
};

type Op =
  | { op: "flow"; port: number; state: string; heard: boolean }
  | { op: "destroy"; port: number; heard: boolean }
  | { op: "pass"; ms: number }
  | { op: "clock"; ms: number }
  | { op: "hold" | "release" | "go" | "reconcile" | "lose" | "connect" | "veto" | "wake" | "quiet" };

/** A tracker in a world of one instance: the kernel's table, events that may get lost, and the way to sleep step by step. */
class Model {
  readonly epoch = { latest: 0, underWay: 0 };
  readonly tracker = new Tracker(OPTIONS, this.epoch);
  /** The kernel's table, each flow with the moment it was opened in steps of this model. */
  readonly table = new Map<number, { flow: Flow; opened: number; since: number }>();
  now = 1e12;
  turn = 0;
  blind = false;
  asleep = false;
  slept = 0;
  raced = 0;
  #confirming: { flows: Flow[]; begun: number } | undefined;
  #verifying = false;
  readonly #used = new Map<number, number>();

  constructor() {
    this.tracker.configure(IDLE, () => true, this.now);
    this.tracker.eligible = true;
    this.tracker.woke(this.now);
  }

  live(): { opened: number; since: number }[] {
    return [...this.table.values()].filter(({ flow: { state }, since }) =>
      !OVER.includes(state) && !(state.startsWith("SYN_") && since + HALF_OPEN <= this.now)
    );
  }

  apply(op: Op): void {
    this.turn++;
    switch (op.op) {
      case "flow": {
        const known = this.table.get(op.port);
        // As in TCP: a handshake is not gone back to, nor anything from the end, but by a new connection.
        const back = op.state.startsWith("SYN_") && !known?.flow.state.startsWith("SYN_");
        const anew = !known || back || (OVER.includes(known.flow.state) && !OVER.includes(op.state));
        if (anew && known) this.apply({ op: "destroy", port: op.port, heard: op.heard });
        const changed = flow({ source_port: op.port + (this.#used.get(op.port) ?? 0), state: op.state });
        // Answered after it was given up.
        const late = known && !anew && !op.state.startsWith("SYN_") && !this.live().includes(known);
        const { opened, since } = anew || late ? { opened: this.turn, since: this.now } : known!;
        this.table.set(op.port, { flow: changed, opened, since });
        if (op.heard) this.tracker.event(anew ? "new" : "update", changed, this.now);
        break;
      }
      case "destroy": {
        const known = this.table.get(op.port);
        this.table.delete(op.port);
        if (known && op.heard) this.tracker.event("destroy", known.flow, this.now);
        // A client does not use a port again at once; where the end was heard, it may.
        if (!op.heard) this.#used.set(op.port, (this.#used.get(op.port) ?? 0) + 10);
        break;
      }
      case "pass":
        this.now += op.ms;
        this.tracker.expire(this.now);
        break;
      case "clock": {
        const before = this.live();
        this.now += op.ms;
        for (const each of this.table.values()) {
          // What was given up once stays so, whatever the clock says.
          const old = each.flow.state.startsWith("SYN_") && !before.includes(each);
          each.since = old ? -Infinity : Math.min(each.since, this.now);
        }
        this.tracker.expire(this.now);
        break;
      }
      case "hold":
        this.tracker.hold(HOLD, this.now);
        break;
      case "release":
        this.tracker.release();
        break;
      case "reconcile":
        if (!this.#confirming) this.#sync(this.#begin());
        break;
      case "lose":
        this.blind = true;
        break;
      case "connect":
        if (this.blind && !this.#confirming) this.#sync(this.#begin());
        if (!this.#confirming) this.blind = false;
        break;
      case "veto":
        if (this.tracker.attempt?.phase === "asked") {
          this.tracker.attempt = null;
          this.tracker.refuse({ kind: "vetoed", plugin: "p", code: "c", message: "m", at: this.now });
        }
        break;
      case "wake":
        if (this.asleep && !this.tracker.attempt) this.#wake();
        break;
      case "quiet":
        for (const left of [...this.table.keys()]) this.apply({ op: "destroy", port: left, heard: true });
        this.apply({ op: "connect" });
        this.apply({ op: "pass", ms: IDLE + HOLD });
        break;
      case "go":
        this.#go();
        break;
    }
  }

  /** One step on the way to sleep. */
  #go(): void {
    const { tracker } = this;
    if (this.asleep) return this.#verifying ? this.#verify() : undefined;
    const { attempt } = tracker;
    if (!attempt) return void tracker.request(this.now, this.blind);
    if (attempt.phase === "queued") {
      if (attempt.overtaken) tracker.attempt = null;
      else {
        attempt.phase = "confirming";
        this.#confirming = this.#begin();
      }
    } else if (attempt.phase === "confirming") {
      const dump = this.#confirming!;
      this.#confirming = undefined;
      this.#sync(dump);
      if (tracker.advance(attempt, "asked", this.now, this.blind) !== null) tracker.attempt = null;
      else this.#begun = dump.begun;
    } else if (attempt.phase === "asked") {
      if (tracker.advance(attempt, "committed", this.now, this.blind) !== null) return void (tracker.attempt = null);
      const old = this.live().filter(({ opened }) => opened <= this.#begun);
      assert.equal(old.length, 0, "nobody was connected when the dump before the sleep began");
    } else if (attempt.overtaken === "activity") {
      this.raced++;
      tracker.attempt = null; // restored before it was asleep
    } else {
      this.asleep = this.#verifying = true;
      this.slept++;
      tracker.eligible = false;
      tracker.left("slept");
    }
  }
  #begun = 0;

  #verify(): void {
    this.#sync(this.#begin());
    const { attempt } = this.tracker;
    this.#verifying = false;
    this.tracker.attempt = null;
    if (attempt!.overtaken === "activity") return void (this.raced++, this.#wake());
    assert.equal(this.tracker.connections, 0);
    assert.equal(this.live().length, 0, "it does not sleep while a live flow is there");
  }

  #wake(): void {
    this.asleep = false;
    this.tracker.eligible = true;
    this.tracker.woke(this.now, { cycle: true });
  }

  #begin() {
    this.epoch.latest++;
    this.epoch.underWay++;
    return { flows: [...this.table.values()].map((each) => each.flow), begun: this.turn };
  }

  #sync({ flows }: { flows: Flow[] }): void {
    this.tracker.sync(flows, this.epoch.latest, this.now);
    this.epoch.underWay--;
  }
}

const port = fc.integer({ min: 1, max: 4 });
const heard = fc.boolean();
const states = fc.constantFrom("SYN_SENT", "SYN_RECV", "ESTABLISHED", "FIN_WAIT", "UNKNOWN_12", "TIME_WAIT", "CLOSE");
const OP: fc.Arbitrary<Op> = fc.oneof(
  { weight: 4, arbitrary: fc.record({ op: fc.constant("flow" as const), port, state: states, heard }) },
  { weight: 3, arbitrary: fc.record({ op: fc.constant("destroy" as const), port, heard }) },
  { weight: 4, arbitrary: fc.record({ op: fc.constant("pass" as const), ms: fc.integer({ min: 0, max: 12_000 }) }) },
  {
    weight: 1,
    arbitrary: fc.record({ op: fc.constant("clock" as const), ms: fc.integer({ min: -100_000, max: 100_000 }) }),
  },
  { weight: 20, arbitrary: fc.constant({ op: "go" as const }) },
  { weight: 3, arbitrary: fc.constant({ op: "quiet" as const }) },
  {
    weight: 3,
    arbitrary: fc.record({
      op: fc.constantFrom("hold", "release", "reconcile", "lose", "connect", "veto", "wake"),
    }),
  },
);

// I1 to I6, I11, I13, I26, R2, R4, R8: whatever happens in whatever order, and whatever of it is not heard of.
test("a tracker never sleeps while a live flow is there, and never stays awake for good after the last one is gone", () => {
  let [slept, raced] = [0, 0];
  fc.assert(
    fc.property(fc.array(OP, { maxLength: 120, size: "max" }), (ops) => {
      const model = new Model();
      for (const op of ops) model.apply(op);
      slept += model.slept;
      raced += model.raced;
      // Everybody leaves, and nobody hears of it.
      model.table.clear();
      model.apply({ op: "connect" });
      for (let i = 0; i < 60 && !(model.asleep && !model.tracker.attempt); i++) {
        model.apply({ op: "pass", ms: 2_000 });
        model.apply({ op: "reconcile" });
        for (let step = 0; step < 6; step++) model.apply({ op: "go" });
        model.apply({ op: "connect" });
      }
      assert.ok(model.asleep, "it sleeps in the end");
    }),
    { numRuns: 2_000 },
  );
  assert.ok(slept > 500 && raced > 50, `the histories reach sleeps (${slept}) and races (${raced})`);
});
