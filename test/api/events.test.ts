import assert from "node:assert/strict";
import { test } from "node:test";
import { getLogger } from "@logtape/logtape";
import { definePlugin, type LifecycleEvent, type Plugin } from "../../main.ts";
import { Streams } from "../../plugins/api/sse.ts";
import { deadline } from "../../plugins/shared/async.ts";
import { cleanup, temporaryFolder, until } from "../helpers.ts";
import { apiHost, openStream } from "./support.ts";

const BODY = { name: "web", image: "any" };

// E4, E6: the headers and a heartbeat come before anything has happened.
test("GET /events answers at once, with a heartbeat, and every 15 s again", { timeout: 20_000 }, async (t) => {
  const { url } = await apiHost(t);
  t.mock.timers.enable({ apis: ["setInterval"] });
  cleanup(t).defer(() => t.mock.timers.reset());
  const { response, next } = await openStream(t, `${url}/events`);
  assert.equal(response.status, 200);
  assert.equal(response.headers.get("Content-Type"), "text/event-stream");
  assert.equal(response.headers.get("Cache-Control"), "no-cache");
  assert.equal(response.headers.get("X-Accel-Buffering"), "no");
  assert.deepEqual(await next(), { comment: "heartbeat" });
  for (let i = 0; i < 3; i++) {
    t.mock.timers.tick(15_000);
    assert.deepEqual(await next(), { comment: "heartbeat" });
  }
});

// E8: a manual stop and one that a plugin asked for can be told apart. S14: `from` chains to the `to` before it.
test("GET /events streams each change with its seq, state, actor and cause", async (t) => {
  const { url, call, hypervisor } = await apiHost(t);
  const { event } = await openStream(t, `${url}/events`);
  const { body } = await call("POST", "/instances", BODY, { "X-Request-Id": "r-1" });
  await hypervisor.standby(body.id, { actor: "conntrack-standby", cause: "idle", detail: { idle_for: "5m0s" } });
  await call("DELETE", "/instances/web");
  const events: Record<string, unknown>[] = [];
  for (let seq = 1; events.at(-1)?.action !== "delete"; seq++) {
    const message = await event();
    const data = JSON.parse(message!.data!);
    assert.deepEqual([message!.id, message!.event, data.seq], [String(seq), data.action, seq]);
    assert.equal(data.from, events.at(-1)?.to ?? null);
    assert.deepEqual([data.instance_id, data.instance_name], [body.id, "web"]);
    assert.equal(data.at, new Date(data.at).toISOString());
    assert.equal(data.instance?.state ?? null, data.to);
    events.push(data);
  }
  const by = (action: string) => events.find((each) => each.action === action)!;
  const { actor, cause, detail } = by("standby");
  assert.deepEqual({ actor, cause, detail }, {
    actor: "conntrack-standby",
    cause: "idle",
    detail: { idle_for: "5m0s" },
  });
  assert.deepEqual([by("create").actor, by("create").cause], ["api", "request"]);
  assert.deepEqual(by("create").detail, { request_id: "r-1" });
  assert.deepEqual([by("delete").to, by("delete").instance], [null, null]);
});

test("GET /events filters by instance and by type", async (t) => {
  const { url, call } = await apiHost(t);
  await call("POST", "/instances", BODY);
  const { event } = await openStream(t, `${url}/events?instance=web&type=stop,delete`);
  await call("POST", "/instances", { ...BODY, name: "other" });
  await call("POST", "/instances/other/stop");
  await call("POST", "/instances/web/stop");
  await call("POST", "/instances/web/start");
  await call("DELETE", "/instances/web");
  const seen = [await event(), await event()].map((message) => {
    const { action, instance_name } = JSON.parse(message!.data!);
    return `${action} ${instance_name}`;
  });
  assert.deepEqual(seen, ["stop web", "delete web"]);
});

// E6: what happened between the connections cannot be told yet, which is said rather than passed over.
test("GET /events after a reconnect says that there may be a gap", async (t) => {
  const { url } = await apiHost(t);
  const { event } = await openStream(t, `${url}/events`, { "Last-Event-ID": "7" });
  assert.deepEqual(await event(), { event: "reset", data: '{"last_event_id":"7"}' });
});

// E1, E2: a client that does not keep up is told exactly what it missed, and holds up neither memory nor anybody else.
test("GET /events tells a slow client what it missed", { timeout: 300_000 }, async (t) => {
  const { url, call, host } = await apiHost(t, { host: { event_buffer: 8 } });
  const { body } = await call("POST", "/instances", BODY);
  const instance = host.use("hypervisor").find(body.id)!;
  const slow = await openStream(t, `${url}/events?type=update`);
  const quick = await openStream(t, `${url}/events?type=update`);
  const padding = "x".repeat(200_000);
  const total = 300;
  const first = 1_000_001;
  for (let i = 0; i < total; i++) {
    const seq = first + i;
    const change = { action: "update", from: "Running", to: "Running", actor: "test", cause: "test" } as const;
    const event: LifecycleEvent = { ...change, seq, at: 0, instance_id: body.id, instance, detail: { padding } };
    host.hooks.publish("instance:event", event);
    // The other one reads along and misses nothing.
    assert.equal((await quick.event())!.id, String(seq));
  }
  const [stats] = host.hooks.stats().filter(({ consumer }) => consumer === "api-events");
  assert.ok(stats.deepest <= 9, `queue of ${stats.deepest}`);
  assert.ok(stats.dropped > 0);
  let expected = first;
  let gaps = 0;
  while (expected < first + total) {
    const message = await slow.event();
    if (message!.event === "lagged") {
      const { from, to } = JSON.parse(message!.data!);
      assert.equal(from, expected);
      expected = to + 1;
      gaps++;
    } else assert.equal(Number(message!.id), expected++);
  }
  assert.ok(gaps > 0);
});

test("a client that leaves frees its stream", async (t) => {
  const { url, host, call } = await apiHost(t);
  const subscribers = () => host.hooks.stats().find(({ consumer }) => consumer === "api-events")?.subscribers ?? 0;
  const streams = await Promise.all(Array.from({ length: 20 }, () => openStream(t, `${url}/events`)));
  await until("20 subscribers", () => subscribers() === 20);
  for (const { leave } of streams) leave();
  await until("no subscriber", () => subscribers() === 0);
  assert.equal((await call("GET", "/health")).status, 200);
});

test("streams end when the host closes, those of clients that do not read too", async (t) => {
  const { url, host, call } = await apiHost(t, { folder: temporaryFolder(t) });
  const reading = await openStream(t, `${url}/events`);
  const stuck = await openStream(t, `${url}/events?type=update`);
  const { body } = await call("POST", "/instances", BODY);
  const instance = host.use("hypervisor").find(body.id)!;
  const detail = { padding: "x".repeat(4_000_000) };
  for (let seq = 1000; seq < 1010; seq++) {
    const change = { action: "update", from: "Running", to: "Running", actor: "test", cause: "test" } as const;
    host.hooks.publish("instance:event", { ...change, seq, at: 0, instance_id: body.id, instance, detail });
  }
  const ended = (async () => {
    while (await reading.event());
  })();
  // Sooner than the grace that requests under way are given.
  await deadline(host.close(), 9_000, "Closing the host");
  await ended;
  stuck.leave();
});

test("answer() refuses more than 256 streams until one ends", async () => {
  const streams = new Streams(getLogger(["dormouse", "api"]));
  const call = { id: "r", signal: new AbortController().signal };
  const forever = (signal: AbortSignal) =>
    new Promise<void>((resolve) => signal.addEventListener("abort", () => resolve(), { once: true }));
  const responses = Array.from({ length: 256 }, () => streams.answer(call, ({ signal }) => forever(signal)));
  assert.throws(() => streams.answer(call, () => {}), { code: "rate_limited" });
  await responses[0].body!.cancel();
  await until("a free stream", () => streams.open === 255);
  responses.push(streams.answer(call, ({ signal }) => forever(signal)));
  await Promise.all(responses.slice(1).map((response) => response.body!.cancel()));
  await until("all free", () => streams.open === 0);
});

test("GET /events streams notes in their envelope, and filters them by type or by name", async (t) => {
  const noting = definePlugin({
    name: "noting",
    requires: ["hypervisor"],
    setup: (host) =>
      void host.use("hypervisor").declareNotes({
        rain: { help: "It rains", event: "rain.began" },
        sun: { help: "Sun" },
      }),
  });
  const { url, call, hypervisor } = await apiHost(t, { plugins: [noting as Plugin] });
  const { body } = await call("POST", "/instances", BODY);
  const streams = await Promise.all(
    ["", "?type=rain", "?type=rain.began,stop"].map((query) => openStream(t, `${url}/events${query}`)),
  );
  const origin = { actor: "sky", cause: "clouds" };
  hypervisor.note(body.id, { type: "sun", origin, summary: "The sun shines" });
  const note = hypervisor.note(body.id, { type: "rain", origin, summary: "It rains", detail: { drops: 7 } })!;
  const first = await streams[0].event();
  assert.deepEqual([first!.event, first!.id], ["sun", String(note.seq - 1)]);
  for (const { event } of streams) {
    const message = await event();
    assert.deepEqual([message!.event, message!.id], ["rain.began", String(note.seq)]);
    const { seq, ts, ...rest } = JSON.parse(message!.data!);
    assert.deepEqual(rest, {
      type: "rain.began",
      instance: body.id,
      summary: "It rains",
      detail: { drops: 7 },
      actor: "sky",
      cause: "clouds",
    });
    assert.deepEqual([seq, ts], [note.seq, new Date(note.at).toISOString()]);
  }
});

test("what needs a plugin that is off is refused by the plugin's name", async (t) => {
  const { call } = await apiHost(t);
  await call("POST", "/instances", BODY);
  for (
    const [method, path, plugin, status] of [
      ["GET", "/events?since=3", "journal", 400],
      ["GET", "/events?format=json", "journal", 400],
      ["GET", "/instances/web/events", "journal", 404],
      ["POST", "/instances/web/acquire", "lazy", 404],
      ["DELETE", "/instances/web/leases/x", "lazy", 404],
      ["GET", "/agents", "lazy", 404],
      ["GET", "/metrics", "metrics", 404],
      ["GET", "/instances/web/auto-standby/status", "conntrack-standby", 404],
    ] as const
  ) {
    const reply = await call(method, path);
    assert.deepEqual([reply.status, reply.body.code, reply.body.details.plugin], [status, "feature_off", plugin], path);
    assert.match(reply.body.message, new RegExp(`turn on its plugin with \\[plugins\\.${plugin}\\] in the config$`));
  }
  for (const [field, plugin] of [["health_check", "health"], ["restart_policy", "restart"], ["lazy", "lazy"]]) {
    const reply = await call("POST", "/instances", { ...BODY, name: "other", [field]: {} });
    assert.deepEqual([reply.status, reply.body.code, reply.body.details.plugin], [400, "feature_off", plugin]);
    const cleared = await call("PATCH", "/instances/web", { [field]: null });
    assert.deepEqual([cleared.status, cleared.body.code, cleared.body.details.plugin], [400, "feature_off", plugin]);
  }
});
