import assert from "node:assert/strict";
import { test } from "node:test";
import * as v from "valibot";
import { DormouseError } from "../../main.ts";
import { normalise, planOf, SnapshotPolicy } from "../../plugins/qemu/snapshot-policy.ts";

const HERE = { zstd: null, lz4: null };
const machine = { driver: "qemu" };
const keep = (body: unknown, means = HERE as Parameters<typeof normalise>[2]) =>
  normalise(v.parse(SnapshotPolicy, body), machine, means);

test("normalise() gives a policy its algorithm, its level and durations as Go prints them", () => {
  const cases: [unknown, unknown][] = [
    [{}, {}],
    [{ standby_compression_delay: "90s" }, { standby_compression_delay: "1m30s" }],
    [{ compression: { enabled: true } }, { compression: { enabled: true, algorithm: "zstd", level: 1 } }],
    [{ compression: { enabled: true, algorithm: "lz4" } }, {
      compression: { enabled: true, algorithm: "lz4", level: 0 },
    }],
    [{ compression: { enabled: true, level: 19 } }, { compression: { enabled: true, algorithm: "zstd", level: 19 } }],
    // What is not enabled is not looked at.
    [{ compression: { enabled: false, algorithm: "lz4", level: 99 } }, { compression: { enabled: false } }],
  ];
  for (const [body, kept] of cases) {
    assert.deepEqual(keep(body), kept);
    assert.deepEqual(keep(kept), kept);
  }
});

test("normalise() refuses what is not the algorithm's, or cannot be done here", () => {
  const cases: [unknown, typeof HERE | { zstd: string; lz4: string }, { driver: string }, RegExp][] = [
    [{ enabled: true, level: 0 }, HERE, machine, /level": expected 1 to 19 for zstd, found 0$/],
    [{ enabled: true, level: 20 }, HERE, machine, /level": expected 1 to 19 for zstd, found 20$/],
    [{ enabled: true, algorithm: "lz4", level: 10 }, HERE, machine, /level": expected 0 to 9 for lz4, found 10$/],
    [{ enabled: true }, { zstd: "no program", lz4: "none" }, machine, /zstd cannot be used here: no program$/],
    [{ enabled: true }, HERE, { driver: "process" }, /driver "process" has no file of the memory/],
  ];
  for (const [compression, means, instance, message] of cases) {
    assert.throws(() => normalise(v.parse(SnapshotPolicy, { compression }), instance, means), (error) => {
      assert.ok(error instanceof DormouseError);
      assert.equal(error.code, "invalid_snapshot_policy");
      assert.match(error.message, message);
      return true;
    });
  }
  for (
    const body of [
      { compression: {} },
      { compression: { enabled: true, algorithm: "gzip" } },
      { compression: { enabled: true, level: 1.5 } },
      { compression: { enabled: true, levels: 1 } },
      { standby_compression_delay: "-1s" },
      { standby_compression_delay: 30 },
      { delay: "1s" },
    ]
  ) assert.equal(v.safeParse(SnapshotPolicy, body).success, false, JSON.stringify(body));
});

test("planOf() says what is to be compressed, how and when", () => {
  const of = (body?: unknown) => planOf({ policies: body === undefined ? {} : { snapshot_policy: keep(body) } });
  assert.equal(of(), null);
  assert.equal(of({ standby_compression_delay: "1s" }), null);
  assert.equal(of({ compression: { enabled: false } }), null);
  assert.deepEqual(of({ compression: { enabled: true } }), { algorithm: "zstd", level: 1, delay: 0 });
  const policy = { compression: { enabled: true, algorithm: "lz4", level: 3 }, standby_compression_delay: "1m" };
  assert.deepEqual(of(policy), { algorithm: "lz4", level: 3, delay: 60_000 });
});
