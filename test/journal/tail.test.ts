import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { type Frames, Reader } from "../../plugins/journal/reader.ts";
import { Tail } from "../../plugins/journal/tail.ts";
import { table } from "./table.ts";

class Counting extends Reader {
  looks = 0;
  override window(after: number, instance?: string): Frames {
    this.looks++;
    return super.window(after, instance);
  }
}

// E4: one source for all, so that a commit costs the same however many follow.
test("after() looks at the table once per commit, for 200 who are up to date", async (t) => {
  const { store, rows, write } = await table(t);
  const reader = new Counting(store.db, () => rows.last);
  const tail = new Tail(reader, () => rows.last);
  const seqs = new Array<number>(200).fill(rows.last);
  for (let commit = 1; commit <= 20; commit++) {
    const seq = write({ id: commit % 2 === 0 ? "one" : "two" });
    for (const i of seqs.keys()) {
      const { frames, to } = tail.after(seqs[i], i % 3 === 0 ? "one" : undefined);
      assert.deepEqual(frames.map((frame) => frame.seq), [seq]);
      seqs[i] = to;
    }
    assert.equal(reader.looks, commit);
  }
});

// E1, E2: whatever is asked in whatever order, the answer is what comes next, without a gap and without a repeat.
test("after() gives what the table has, wherever a client is", { timeout: 540_000 }, async (t) => {
  const { rows, reader, write } = await table(t);
  const step = fc.oneof(
    {
      weight: 3,
      arbitrary: fc.record({ write: fc.integer({ min: 1, max: 40 }), padding: fc.constantFrom(0, 50_000) }),
    },
    { weight: 1, arbitrary: fc.record({ write: fc.constant(700), padding: fc.constant(0) }) },
    { weight: 5, arbitrary: fc.record({ behind: fc.integer({ min: 0, max: 1500 }), one: fc.boolean() }) },
  );
  fc.assert(
    fc.property(fc.array(step, { maxLength: 20 }), (steps) => {
      const tail = new Tail(reader, () => rows.last);
      for (const each of steps) {
        if ("write" in each) {
          for (let i = 0; i < each.write; i++) write({ id: i % 2 ? "two" : "one", padding: "x".repeat(each.padding) });
          continue;
        }
        const instance = each.one ? "one" : undefined;
        for (let seq = Math.max(0, rows.last - each.behind); seq < rows.last;) {
          const { frames, to } = tail.after(seq, instance);
          const expected = reader.read({ after: seq, limit: 10_000 }).filter((row) => row.seq <= to);
          const given = frames.filter(({ instance_id }) => instance === undefined || instance_id === instance);
          assert.deepEqual(
            given.map((frame) => frame.seq),
            expected.filter(({ instance_id }) => instance === undefined || instance_id === instance).map((r) => r.seq),
          );
          assert.ok(to > seq, "it goes on");
          seq = to;
        }
        assert.deepEqual(tail.after(rows.last), { frames: [], to: rows.last });
      }
    }),
    { numRuns: 8 },
  );
});
