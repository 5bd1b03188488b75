import assert from "node:assert/strict";
import { test, type TestContext } from "node:test";
import { cleanup, temporaryFolder, until } from "../helpers.ts";
import { ORIGIN, ScriptedDriver } from "../hypervisor/scripted.ts";
import { Client, type Page, type World, world } from "./world.ts";

/** A client that has its headers, so what happens from here on is for it. */
async function follow(t: TestContext, { api }: World, query = "", lastId?: string): Promise<Client> {
  const client = new Client(`${api.url}/events${query}`, lastId === undefined ? {} : { lastId });
  cleanup(t).defer(() => client.leave());
  await client.until(({ status }) => status > 0);
  assert.equal(client.status, 200);
  return client;
}

const raws = (client: Client) => client.messages.map(({ raw }) => raw);
const ids = (client: Client) => client.messages.map(({ id }) => Number(id));

/** An instance with a life of changes and notes, deleted at the end. */
async function life({ hypervisor, create, note }: World, name: string): Promise<string> {
  const id = await create(name);
  note(id, `${name} is new`, { n: 1 });
  await hypervisor.update(id, { tags: { team: name } }, ORIGIN);
  await hypervisor.standby(id, ORIGIN);
  hypervisor.note(id, { type: "lazy_start", origin: ORIGIN, summary: "Started" });
  await hypervisor.restore(id, ORIGIN);
  await hypervisor.delete(id, ORIGIN);
  return id;
}

// E4, E6: the headers and a heartbeat come at once, every message has an id, and each is the same whenever it is sent.
test("GET /events replays what it has sent live, byte for byte, and goes on live", async (t) => {
  const w = await world(t);
  const live = await follow(t, w);
  await life(w, "a");
  await life(w, "b");
  await live.got(w.journal.last);
  assert.deepEqual(ids(live), Array.from({ length: w.journal.last }, (_, i) => i + 1));
  for (const { data, event } of live.messages) {
    const shown = JSON.parse(data);
    assert.equal(shown.action ?? shown.type, event);
    assert.ok("instance" in shown && typeof shown.actor === "string" && typeof shown.cause === "string");
  }
  const half = live.messages[6].id;
  const replays = [await follow(t, w, "?since=0"), await follow(t, w, "", half), await follow(t, w, `?since=${half}`)];
  await life(w, "c");
  await live.got(w.journal.last);
  for (const [client, begin] of [[replays[0], 0], [replays[1], 7], [replays[2], 7]] as const) {
    await client.got(w.journal.last - begin);
    assert.deepEqual(raws(client), raws(live).slice(begin));
  }
});

test("GET /events sends the same after a restart of the host", async (t) => {
  const folder = temporaryFolder(t);
  const driver = new ScriptedDriver();
  const before = await world(t, { folder, driver });
  const live = await follow(t, before);
  await life(before, "a");
  await live.got(before.journal.last);
  await before.host.close();
  await live.until(() => false); // ended by the close
  const after = await world(t, { folder, driver });
  const replay = await follow(t, after, "?since=0");
  await replay.got(live.messages.length);
  assert.deepEqual(raws(replay), raws(live));
  const resumed = await follow(t, after, "", live.lastId);
  const id = await after.create("b");
  await resumed.got(2);
  assert.deepEqual(resumed.messages.map(({ data }) => JSON.parse(data).instance_id), [id, id]);
});

test("GET /events goes on from Last-Event-ID rather than from since", async (t) => {
  const w = await world(t);
  await life(w, "a");
  const client = await follow(t, w, "?since=0", "4");
  await client.got(1);
  assert.equal(client.messages[0].id, "5");
});

test("GET /events begins with what comes when no id is given", async (t) => {
  const w = await world(t);
  await life(w, "a");
  const { last } = w.journal;
  const client = await follow(t, w);
  await w.create("b");
  await client.got(2);
  assert.deepEqual(ids(client), [last + 1, last + 2]);
});

// E6: an id that cannot be gone on from is answered by one message that says so, and then by all that is kept.
test("GET /events sends one reset after an id that is not of this history", async (t) => {
  const w = await world(t);
  await life(w, "a");
  const { last } = w.journal;
  for (const id of [String(last + 1), "99999999999999999999", "not-ours", "-1", "1.5"]) {
    const client = await follow(t, w, "", id);
    const [reset] = await client.got(last + 1);
    assert.deepEqual([reset.event, reset.id], ["reset", "0"], id);
    assert.deepEqual(JSON.parse(reset.data), { last_event_id: id, first: 1, last });
    assert.deepEqual(ids(client), Array.from({ length: last + 1 }, (_, i) => i));
  }
  // Who has seen everything is in no gap.
  const client = await follow(t, w, "", String(last));
  await w.create("b");
  assert.equal((await client.got(1))[0].id, String(last + 1));
});

test("GET /events sends a reset to who was following before the journal was off", async (t) => {
  const folder = temporaryFolder(t);
  const driver = new ScriptedDriver();
  const one = await world(t, { folder, driver });
  const id = await one.create("web");
  one.note(id, "3");
  await one.host.close();
  const two = await world(t, { folder, driver, table: null });
  two.note(id, "4");
  await two.host.close();
  const w = await world(t, { folder, driver });
  w.note(id, "5");
  const client = await follow(t, w, "", "2");
  await client.got(3);
  assert.deepEqual(client.messages.map(({ event, id }) => [event, id]), [
    ["reset", "2"],
    ["test:note", "3"],
    ["test:note", "5"],
  ]);
  assert.deepEqual(JSON.parse(client.messages[0].data), { last_event_id: "2", first: 5, last: 5 });
  const { body } = await w.get("/events?format=json&since=2");
  assert.deepEqual([body.reset, body.events.length, body.next, body.first], [true, 2, 5, 5]);
  assert.equal((await w.get("/events?format=json&since=5")).body.reset, undefined);
});

test("GET /events filters by instance and by type, live and in a replay", async (t) => {
  const w = await world(t);
  const a = await w.create("a");
  const queries = [
    "?instance=a",
    "?type=create,delete",
    `?instance=${a}&type=test:note`,
    "?type=container.lazy_started",
  ];
  const live = await Promise.all(queries.map((query) => follow(t, w, query, "0")));
  await w.hypervisor.delete(a, ORIGIN);
  await life(w, "b");
  const again = await w.create("a");
  w.note(again, "another of that name");
  const rows = w.journal.read({ after: 0, limit: 1000 });
  const wanted = [
    ({ instance_id }: { instance_id: string }) => instance_id === a,
    ({ type }: { type: string }) => type === "create" || type === "delete",
    () => false,
    ({ event }: { event: string }) => event === "container.lazy_started",
  ];
  for (const [i, client] of live.entries()) {
    // By its full id what is deleted can still be asked for.
    const replay = await follow(t, w, queries[i].replace("instance=a", `instance=${a}`), "0");
    const expected = rows.filter(wanted[i]).map(({ seq }) => seq);
    await client.got(expected.length);
    await replay.got(expected.length);
    assert.deepEqual([ids(client), ids(replay)], [expected, expected], queries[i]);
  }
});

// E4
test("GET /events refuses filters that mean nothing, with a suggestion", async (t) => {
  const { get } = await world(t);
  const cases: [string, number, RegExp][] = [
    ["?type=strat", 400, /"strat" \(did you mean "start"\?\)/],
    ["?type=test:not", 400, /"test:not" \(did you mean "test:note"\?\)/],
    ["?type=create,", 400, /type is ""/],
    ["?instance=nobody", 404, /No instance "nobody"/],
    ["?since=x", 400, /expected a whole number/],
    ["?since=-1", 400, /expected a whole number/],
    ["?format=xml", 400, /expected \("sse" \| "json"\)/],
    ["?limit=5", 400, /expected none without format=json/],
    ["?format=json&limit=0", 400, /expected 1 to 1000/],
    ["?format=json&limit=1001", 400, /expected 1 to 1000/],
    ["?sinse=1", 400, /Unknown field "sinse" \(did you mean "since"\?\)/],
  ];
  for (const [query, status, message] of cases) {
    const answer = await get(`/events${query}`);
    assert.equal(answer.status, status, query);
    assert.match(answer.body.message, message, query);
  }
});

test("GET /events?format=json pages through what the stream sends", async (t) => {
  const w = await world(t);
  const live = await follow(t, w);
  await life(w, "a");
  await life(w, "b");
  await live.got(w.journal.last);
  const datas = live.messages.map(({ data }) => data);
  for (const filter of ["", "&type=create,delete,test:note", "&instance=nobody-yet"]) {
    if (filter.includes("nobody")) {
      assert.equal((await w.get(`/events?format=json${filter}`)).status, 404);
      continue;
    }
    const expected = datas.filter((data) => filter === "" || /"(action|type)":"(create|delete|test:note)"/.test(data));
    const texts: string[] = [];
    let page: Page | undefined;
    for (let since = ""; page?.more ?? true; since = `&since=${page.next}`) {
      const { text, body } = await w.get(`/events?format=json&limit=3${filter}${since}`);
      page = body;
      texts.push(...body.events.map((event) => JSON.stringify(event)));
      assert.ok(text.includes(texts.at(-1)!), "the very bytes");
      assert.deepEqual([body.first, body.last, body.reset], [1, w.journal.last, undefined]);
      assert.ok(body.events.length === 3 || !body.more);
    }
    assert.deepEqual(texts, expected);
    // A filter that nothing more passes leaves the client at the end, and not where its last event was.
    assert.equal(page!.next, w.journal.last);
    const { body } = await w.get(`/events?format=json&since=${page!.next}${filter}`);
    assert.deepEqual([body.events, body.more, body.next], [[], false, w.journal.last]);
  }
  const { body } = await w.get("/events?format=json&since=1000");
  assert.deepEqual([body.reset, body.events.length, body.next], [true, datas.length, w.journal.last]);
});

test("GET /instances/{id}/events shows an instance's history, also once it is deleted", async (t) => {
  const w = await world(t);
  const gone = await life(w, "a");
  const id = await w.create("b");
  const history = await w.get("/instances/b/events");
  assert.deepEqual(history.body.events.map(({ action }) => action), ["create", "start"]);
  assert.equal((await w.get(`/instances/${id.slice(0, 20)}/events`)).text, history.text);
  const past = await w.get(`/instances/${gone}/events`);
  assert.equal(past.body.events.length, w.journal.read({ after: 0, limit: 100, instance: gone }).length);
  assert.equal(past.body.events.at(-1)!.action, "delete");
  const { body } = await w.get(`/instances/${gone}/events?type=test:note&limit=1`);
  assert.deepEqual(body.events.map(({ summary }) => summary), ["a is new"]);
  // Not the name alone: a single letter may be the begin of the other one's id.
  for (const reference of [gone.slice(0, 20), "nobody"]) {
    const answer = await w.get(`/instances/${reference}/events`);
    assert.deepEqual([answer.status, answer.body.code], [404, "not_found"], reference);
  }
  assert.equal((await w.get(`/instances/${gone}/events?type=nonsense`)).status, 400);
});

// E9: no row is too long, and none has anything in it that ends a message or a line.
test("long rows and odd characters arrive whole", async (t) => {
  const w = await world(t);
  const live = await follow(t, w);
  const odd = 'a\nb\r\nc\rd\u2028e\0f\u{1F634}g\ud800h"\\ data: x\n\nid: 7\n\n';
  const env = { LONG: "x".repeat(700_000), ODD: "\n\r\n\u2028" };
  const { id } = await w.hypervisor.create({ name: "web", image: "any", env }, ORIGIN);
  w.note(id, odd, { odd, long: "y".repeat(900_000) });
  await live.got(3);
  const replay = await follow(t, w, "?since=0");
  await replay.got(3);
  assert.deepEqual(raws(replay), raws(live));
  assert.deepEqual(ids(live), [1, 2, 3]);
  const [create, , note] = live.messages.map(({ data }) => JSON.parse(data));
  assert.deepEqual(create.instance.env, env);
  assert.deepEqual([note.detail.odd, note.detail.long.length], [odd, 900_000]);
  const { body } = await w.get("/events?format=json");
  assert.deepEqual(body.events, live.messages.map(({ data }) => JSON.parse(data)));
});

test("a page of long rows ends early, and the next goes on", async (t) => {
  const w = await world(t);
  const id = await w.create("web");
  for (let i = 0; i < 12; i++) w.note(id, String(i), { long: "x".repeat(900_000) });
  const seen: unknown[] = [];
  let pages = 0;
  for (let since = 0, more = true; more; pages++) {
    const { body } = await w.get(`/events?format=json&limit=1000&since=${since}`);
    seen.push(...body.events.map(({ seq }) => seq));
    [since, more] = [body.next, body.more];
  }
  assert.deepEqual(seen, Array.from({ length: w.journal.last }, (_, i) => i + 1));
  assert.ok(pages > 2, `${pages} pages`);
});

test("streams are counted while they are open", async (t) => {
  const w = await world(t);
  const clients = [await follow(t, w), await follow(t, w, "?since=0"), await follow(t, w, "?type=delete")];
  assert.equal(w.journal.stats().streams, 3);
  for (const client of clients) client.leave();
  await until("none", () => w.journal.stats().streams === 0);
});

test("/openapi.json has the stream, the page and the history", async (t) => {
  const { get } = await world(t);
  const { paths, components } = JSON.parse((await get("/openapi.json")).text);
  const content = (path: string) => Object.keys(paths[path].get.responses["200"].content);
  assert.deepEqual(content("/events"), ["text/event-stream", "application/json"]);
  assert.deepEqual(content("/instances/{id}/events"), ["application/json"]);
  assert.ok(["EventPage", "ChangeEvent", "NoteEvent"].every((name) => name in components.schemas));
});
