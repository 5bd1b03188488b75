import assert from "node:assert/strict";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { DatabaseSync } from "node:sqlite";
import { test } from "node:test";
import { execa } from "execa";
import { stringify } from "smol-toml";
import { cleanup, RUNTIME, temporaryFolder } from "../helpers.ts";
import { assertOrdered, receiver } from "./webhook-world.ts";

const SCRIPT = join(import.meta.dirname!, "webhook-writer.ts");

// E7
test("a host that is killed while it sends has passed over nothing, and the next one goes on in order", {
  timeout: 600_000,
}, async (t) => {
  const to = await receiver(t);
  const folder = temporaryFolder(t);
  const file = join(folder, "config.toml");
  const plugins = {
    store: {},
    hypervisor: { default_driver: "scripted" },
    scripted: {},
    noting: {},
    journal: { webhook: [{ url: to.url, max_backoff: "1s" }] },
  };
  writeFileSync(file, stringify({ data_dir: "data", host: {}, plugins }));
  const run = (mode: string) => {
    const [command, ...flags] = RUNTIME;
    const child = execa(command, [...flags, SCRIPT, file, mode], { reject: false });
    const kill = async () => {
      process.kill(child.pid!, "SIGKILL");
      return await child;
    };
    let over = false;
    const ended = child.then((result) => (over = true, result));
    cleanup(t).defer(async () => {
      if (!over) await kill();
    });
    return { kill, ended };
  };

  for (let round = 1; round <= 5; round++) {
    // Some are refused at first, so that lanes are behind, and some take their time, so that they are under way.
    const refused = new Set<number>();
    to.answer = async ({ body }) => {
      const seq = body.seq as number;
      if (seq % 13 === round && !refused.has(seq)) {
        refused.add(seq);
        return 500;
      }
      if (seq % 5 === 0) await new Promise((resolve) => setTimeout(resolve, 3));
      return 204;
    };
    const until = to.taken.length + 150 + 37 * round;
    const host = run("write");
    const first = await Promise.race([to.when(({ taken }) => taken.length >= until), host.ended]);
    assert.equal(first, undefined, `the host ended by itself: ${JSON.stringify(first)}`);
    await host.kill();

    using db = new DatabaseSync(join(folder, "data", "dormouse.db"), { readOnly: true });
    const [{ next }] = db.prepare("SELECT next FROM journal_webhooks").all() as { next: number }[];
    const lanes = db.prepare("SELECT instance, head, until FROM journal_webhook_lanes").all();
    const head = new Map(lanes.map((lane) => [lane.instance, lane.head as number]));
    const taken = new Set(to.taken.map(({ body }) => body.seq));
    const rows = db.prepare("SELECT id, instance FROM journal WHERE id < ?").all(next);
    const ahead = rows.filter(({ id, instance }) =>
      (id as number) < (head.get(instance) ?? Infinity) && !taken.has(id)
    );
    assert.deepEqual(ahead, [], `round ${round}: passed over and not taken`);
    t.diagnostic(`round ${round}: ${rows.length} rows scanned, ${lanes.length} lanes behind, ${to.taken.length} taken`);
  }

  to.answer = () => 204;
  const db = new DatabaseSync(join(folder, "data", "dormouse.db"), { readOnly: true });
  cleanup(t).defer(() => db.close());
  const host = run("idle");
  const ids = () => db.prepare("SELECT id FROM journal ORDER BY id").all().map(({ id }) => id as number);
  const first = await Promise.race([
    to.when(({ taken }) => taken.length > 0 && new Set(taken.map(({ body }) => body.seq)).size >= ids().length),
    host.ended,
  ]);
  assert.equal(first, undefined, `the host ended by itself: ${JSON.stringify(first)}`);
  await host.kill();
  assert.deepEqual(to.seqs.toSorted((a, b) => a - b), ids());
  assertOrdered(to.taken);
  t.diagnostic(`${ids().length} events, ${to.taken.length - ids().length} of them once more`);
});
