import assert from "node:assert/strict";
import { test } from "node:test";
import { openStream } from "../api/support.ts";
import { ManualClock } from "../clock.ts";
import { until } from "../helpers.ts";
import { Client, world } from "./world.ts";

/** Far more than the buffers of sockets hold. */
const PADDING = "x".repeat(300_000);
const TOTAL = 100;

// E1: a client that does not read is disconnected, not skipped; with its last id it goes on where it was.
test(
  "a client that is too slow is disconnected, and misses nothing when it comes again",
  { timeout: 300_000 },
  async (t) => {
    const clock = new ManualClock(Date.now());
    const { api, create, note, journal } = await world(t, { clock, table: { slow_client_timeout: "30s" } });
    const slow = await openStream(t, `${api.url}/events?type=test:note`);
    const quick = new Client(`${api.url}/events?type=test:note`);
    await quick.until(({ status }) => status === 200);
    const id = await create("web");
    for (let i = 0; i < TOTAL; i++) {
      note(id, String(i), { padding: PADDING });
      // The other one is held up by nothing.
      assert.equal((await quick.got(i + 1)).at(-1)!.event, "test:note");
    }
    assert.equal(journal.stats().streams, 2);
    await until("the slow one is disconnected", async () => {
      await clock.pass(30_000);
      return journal.stats().streams === 1;
    });
    const got: { id?: string; data?: string }[] = [];
    for (let message = await slow.event(); message; message = await slow.event()) got.push(message);
    const lastId = got.at(-1)!.id!;
    assert.ok(got.length < TOTAL, "it has been sent everything");
    const again = new Client(`${api.url}/events?type=test:note`, { lastId });
    await again.until(({ messages }) => messages.length + got.length === TOTAL);
    const summaries = [...got, ...again.messages].map(({ data }) => JSON.parse(data!).summary);
    assert.deepEqual(summaries, Array.from({ length: TOTAL }, (_, i) => String(i)));
    quick.leave();
    again.leave();
    await until("all have left", () => journal.stats().streams === 0);
  },
);
