import assert from "node:assert/strict";
import { test } from "node:test";
import { Leases } from "../../plugins/lazy/leases.ts";

test("Leases: a lease is held until its end, and a renewal begins it anew", () => {
  const leases = new Leases();
  assert.equal(leases.held(0), false);
  const { id } = leases.grant(100, 1_000);
  assert.deepEqual([leases.held(1_099), leases.held(1_100)], [true, false]);
  leases.renew(id, undefined, 1_050);
  assert.deepEqual([leases.held(1_149), leases.nextEnd(1_149)], [true, 1_150]);
  leases.renew(id, 10, 1_100);
  assert.deepEqual(
    [leases.nextEnd(1_100), leases.held(1_110)],
    [1_110, false],
    "the last renewal wins, a shorter one too",
  );
  assert.equal(leases.renew(id, undefined, 1_110), undefined);
  assert.equal(leases.size, 0);
});

test("Leases.expire() says when the last that is over ended", () => {
  const leases = new Leases();
  leases.grant(100, 0);
  leases.grant(300, 0);
  leases.grant(900, 0);
  assert.equal(leases.expire(50), null);
  assert.equal(leases.expire(500), 300);
  assert.deepEqual([leases.size, leases.nextEnd(500)], [1, 900]);
  assert.equal(leases.expire(900), 900);
});

test("Leases: a clock that steps back makes no lease longer than its time", () => {
  const leases = new Leases();
  const { id } = leases.grant(100, 10_000);
  assert.equal(leases.nextEnd(5_000), 5_100);
  leases.expire(5_000);
  assert.deepEqual([leases.held(5_099), leases.held(5_100)], [true, false]);
  assert.equal(leases.release(id, 5_050), true);
  assert.equal(leases.release(id, 5_050), false);
});

test("Leases: those of before are there again, those that are over meanwhile too, until someone looks", () => {
  const before = new Leases();
  before.grant(100, 0);
  before.grant(1_000, 0);
  const after = new Leases(JSON.parse(JSON.stringify(before.list())));
  assert.deepEqual(after.list(), before.list());
  assert.equal(after.expire(500), 100);
  assert.equal(after.held(500), true);
});
