/** A host for test/store.test.ts to kill: commits numbered pairs of rows and prints each number once it is committed. */
import { writeSync } from "node:fs";
import process from "node:process";
import { loadPlugins, startHost } from "../main.ts";
import { readConfig } from "../plugins/shared/config.ts";

async function main(file: string) {
  const { config } = readConfig(file, { env: {}, dataDir: "" });
  const store = (await startHost(config, await loadPlugins(config))).use("store");
  store.migrate("test", ["CREATE TABLE a (n INTEGER PRIMARY KEY); CREATE TABLE b (n INTEGER PRIMARY KEY)"]);
  const { next } = store.db.prepare("SELECT COALESCE(MAX(n), 0) + 1 AS next FROM a").get() as { next: number };
  for (let n = next; n < next + 100_000; n++) {
    store.transaction(() => {
      store.db.prepare("INSERT INTO a VALUES (?)").run(n);
      store.db.prepare("INSERT INTO b VALUES (?)").run(n);
    });
    writeSync(1, `${n}\n`);
  }
}

void main(process.argv[2]);
