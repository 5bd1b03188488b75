import assert from "node:assert/strict";
import { DatabaseSync } from "node:sqlite";

/** What a database of the store says of itself; null where it has no tables yet. */
export interface Verdict {
  /** The last number that was given out. */
  sequence: number;
  instances: number;
}

/**
 * Opens what a dead host left behind, and checks that its changes and its events are the same story: as many rows as
 * numbers, each instance as its last event says, and none without.
 *
 * @throws {AssertionError} where there is one without the other
 */
export function judge(file: string): Verdict | null {
  const db = new DatabaseSync(file);
  try {
    const rows = (sql: string) => db.prepare(sql).all() as Record<string, number & string>[];
    assert.deepEqual(rows("PRAGMA integrity_check").map(Object.values), [["ok"]]);
    if (rows("SELECT name FROM sqlite_schema WHERE name = 'journal_state'").length === 0) return null;
    const [{ value: sequence }] = rows("SELECT value FROM sequence");
    const [{ first }] = rows("SELECT first FROM journal_state");
    const ids = rows("SELECT id FROM journal ORDER BY id").map(({ id }) => id);
    assert.deepEqual(ids, Array.from({ length: sequence - first + 1 }, (_, i) => first + i), "a row for each number");

    const last = new Map(
      rows("SELECT * FROM journal WHERE summary IS NULL ORDER BY id").map((row) => [row.instance, row]),
    );
    const instances = rows("SELECT id, body FROM instances");
    for (const { id, body } of instances) {
      const { state, phases } = JSON.parse(body);
      const row = last.get(id);
      assert.ok(row, `instance ${id} has no event`);
      assert.equal(row.to_state, state, `the state of ${id}`);
      assert.equal(JSON.parse(row.shown).current_phase_since, new Date(phases.since).toISOString());
    }
    const there = new Set(instances.map(({ id }) => id));
    for (const [id, { type }] of last) assert.equal(type !== "delete", there.has(id), `${type} of ${id}`);

    // What a plugin has written with a note is there if, and only if, the note is.
    const notes = new Map(
      rows("SELECT * FROM journal WHERE type = 'test:note' ORDER BY id").map((row) => [row.instance, row]),
    );
    const said = new Map(rows("SELECT * FROM runtimes WHERE field = 'said'").map((row) => [row.instance_id, row]));
    for (const id of there) {
      const [note, runtime] = [notes.get(id), said.get(id)].map((row) => row && JSON.parse(row.detail ?? row.body).n);
      assert.equal(note, runtime, `the last note of ${id}`);
    }
    return { sequence, instances: instances.length };
  } finally {
    db.close();
  }
}
