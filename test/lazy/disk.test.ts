/** What becomes of leases and countdowns where a change cannot be written. */
import assert from "node:assert/strict";
import { test, type TestContext } from "node:test";
import { settle } from "../clock.ts";
import { PERSON, world } from "./world.ts";

/** A disk that takes no rows of a table while it is full. */
function diskOf({ host }: Awaited<ReturnType<typeof world>>, table: string) {
  const { db } = host.use("store");
  return {
    fill: () =>
      db.exec(`CREATE TEMP TRIGGER full BEFORE INSERT ON ${table} BEGIN SELECT RAISE(ABORT, 'disk full'); END`),
    free: () => db.exec("DROP TRIGGER full"),
  };
}

test("a change that is rolled back takes no lease with it", async (t: TestContext) => {
  const w = await world(t);
  const { id } = await w.instance("web");
  await w.acquire("web", "10m");
  const disk = diskOf(w, "journal");
  const before = w.lazy.stats();
  for (
    const change of [
      () => w.hypervisor.update(id, { lazy: null }, PERSON),
      () => w.hypervisor.stop(id, PERSON),
    ]
  ) {
    disk.fill();
    await assert.rejects(change(), /disk full/);
    disk.free();
    assert.deepEqual(w.lazy.stats(), before);
    const asleep = w.hypervisor.standby(id, { actor: "auto-standby", cause: "idle" });
    await assert.rejects(asleep, { code: "vetoed", message: /"lazy".* a lease is held/ });
  }
  // And what comes after the lease comes all the same.
  await w.clock.pass(10 * 60_000 + 10 * 60_000);
  assert.equal(w.state("web"), "Stopped");
});

test("a lease that ends while nothing can be written is followed by its stop once there is room", async (t) => {
  const w = await world(t);
  await w.instance("web");
  await w.acquire("web", "30s");
  const disk = diskOf(w, "runtimes");
  disk.fill();
  await w.clock.pass(31_000);
  disk.free();
  await settle();
  await w.clock.pass(20 * 60_000);
  assert.equal(w.state("web"), "Stopped");
});
