/** Deciding goes on where nothing can be written. */
import assert from "node:assert/strict";
import { test } from "node:test";
import { capturedLogs } from "../helpers.ts";
import { world } from "./world.ts";

const FILL = "CREATE TEMP TRIGGER full BEFORE UPDATE ON sequence BEGIN SELECT RAISE(ABORT, 'disk full'); END";

for (const when of ["its time comes", "the table is read"]) {
  test(`an instance sleeps after all when the disk was full as ${when}`, async (t) => {
    const logs = capturedLogs(t);
    const w = await world(t);
    const { id } = await w.instance("web");
    const { db } = w.host.use("store");
    let full = false;
    const fill = () => void (full || db.exec(FILL), full = true);
    if (when === "its time comes") fill();
    else w.kernel.duringDump = fill;
    await w.clock.pass(11_000);
    assert.equal(w.state(id), "Running");
    assert.ok(
      logs.some((line) => line.includes("Noting standby:decision") && line.includes("disk full")),
      logs.join("\n"),
    );
    w.kernel.duringDump = undefined;
    db.exec("DROP TRIGGER full");
    await w.clock.pass(120_000);
    assert.equal(w.state(id), "Standby");
  });
}
