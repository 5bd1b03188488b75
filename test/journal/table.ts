import { join } from "node:path";
import type { TestContext } from "node:test";
import { getLogger } from "@logtape/logtape";
import { definePlugin, type Instance, type Store } from "../../main.ts";
import { BLANK } from "../../plugins/hypervisor/records.ts";
import { Reader } from "../../plugins/journal/reader.ts";
import { Rows } from "../../plugins/journal/rows.ts";
import storePlugin from "../../plugins/store.ts";
import { startWith, temporaryFolder } from "../helpers.ts";

/** The journal's table in a real store without a registry: a test writes its rows, at times of its own. */
export async function table(t: TestContext, folder = temporaryFolder(t)) {
  const found: { store?: Store } = {};
  const taker = definePlugin({
    name: "taker",
    requires: ["store"],
    setup: (host) => void (found.store = host.use("store")),
  });
  const host = await startWith(t, [storePlugin, taker], { folder: join(folder) });
  const store = found.store!;
  store.db.exec("CREATE TABLE IF NOT EXISTS sequence (value INTEGER)");
  store.db.exec("INSERT INTO sequence SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM sequence)");
  const log = getLogger(["dormouse", "journal"]);
  const rows = new Rows({ store, log, present: (instance) => JSON.stringify({ id: instance.id }) });
  const reader = new Reader(store.db, () => rows.last);
  const instance: Instance = { ...BLANK, id: "one", name: "one" };
  /** The next row, as a note is written. */
  const write = ({ at = 0, id = "one", padding = "" } = {}): number => {
    const seq = rows.last + 1;
    const of = { ...instance, id };
    const what = { type: "test:note", event: "test:note", instance_id: id, instance: of, summary: `${seq}` };
    store.transaction(() => {
      store.db.prepare("UPDATE sequence SET value = ?").run(seq);
      rows.note({ seq, at, ...what, actor: "test", cause: "test", detail: { padding } });
    });
    return seq;
  };
  const kept = () => reader.read({ after: 0, limit: 1_000_000 }).map(({ seq }) => seq);
  return { host, store, rows, reader, write, kept };
}
