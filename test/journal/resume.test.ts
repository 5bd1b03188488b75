import assert from "node:assert/strict";
import { test } from "node:test";
import { setImmediate as turn } from "node:timers/promises";
import { ORIGIN } from "../hypervisor/scripted.ts";
import { Client, type Message, world } from "./world.ts";

const TOTAL = 10_000;
const KILLS = 100;

/** Numbers from 0 to below 1 that a seed gives again (https://en.wikipedia.org/wiki/Linear_congruential_generator). */
function randomOf(seed: number): () => number {
  let state = seed >>> 0;
  return () => (state = (Math.imul(state, 1664525) + 1013904223) >>> 0) / 2 ** 32;
}

// E1, E2, E6: the issue's own words. Connections are cut at a random event or a random byte, in the middle of a message
// or of a line, during replays and while the client is up to date; it goes on by the id of the last message it has whole.
test("a client that is killed 100 times while 10,000 events are written sees each once, in order", {
  timeout: 900_000,
}, async (t) => {
  const seed = Date.now() % 2 ** 31;
  const random = randomOf(seed);
  const { api, journal, hypervisor, note, create } = await world(t);
  const [a, b] = [await create("a"), await create("b")];
  const killed = ["", `?instance=${a}`, "?type=update"].map((query) => ({
    query,
    kills: 0,
    seen: [] as Message[],
    client: undefined as Client | undefined,
    /** The event at which it is killed next. */
    at: 1,
  }));

  const written = (async () => {
    while (journal.last < TOTAL) {
      const id = random() < 0.5 ? a : b;
      if (random() < 0.1) await hypervisor.update(id, { tags: { n: String(journal.last) } }, ORIGIN);
      else note(id, String(journal.last), { n: journal.last });
      for (const each of killed) {
        if (journal.last < each.at) continue;
        each.at += 1 + Math.floor(random() * 1.4 * TOTAL / KILLS);
        each.client?.leave();
      }
      if (random() < 0.2) await turn();
    }
  })();

  await Promise.all(killed.map(async (each) => {
    const connect = (lastId: string, cutAfter: number) =>
      each.client = new Client(`${api.url}/events${each.query}`, { lastId, cutAfter });
    let lastId = "0";
    for (; journal.last < TOTAL; each.kills++) {
      const client = connect(lastId, 1 + random() * 60_000);
      await Promise.race([client.until(() => false), written]);
      client.leave();
      each.seen.push(...client.messages);
      lastId = client.lastId!;
    }
    await written;
    const expected = journal.read({ after: 0, limit: TOTAL }).filter(({ instance_id, type }) =>
      each.query === "" || (each.query.startsWith("?instance") ? instance_id === a : type === "update")
    ).map(({ seq }) => String(seq));
    const last = connect(lastId, Infinity);
    await last.until(({ messages }) => each.seen.length + messages.length >= expected.length);
    last.leave();
    each.seen.push(...last.messages);
    assert.deepEqual(each.seen.map(({ id }) => id), expected, `seed ${seed}, "${each.query}"`);
    assert.ok(each.kills >= KILLS, `killed ${each.kills} times`);
  }));
});
