import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import process from "node:process";
import { test } from "node:test";
import { execa } from "execa";
import * as v from "valibot";
import { retryAfter, signatureOf } from "../../plugins/journal/webhook-post.ts";
import { Webhook } from "../../plugins/journal/webhooks.ts";
import { settle } from "../clock.ts";
import { capturedLogs, cleanup, freePort, ROOT, RUNTIME, until } from "../helpers.ts";
import { passUntil, receiver, world } from "./webhook-world.ts";

const SECRET = "a secret of the test";
const RECEIVER = `${ROOT}/test/journal/webhook-receiver.ts`;
const LIMIT = { timeout: 300_000 };

test(
  "a webhook is sent changes and notes as JSON, and of the instance its id and name only",
  LIMIT,
  async (t) => {
    const to = await receiver(t);
    const { instance, note, hypervisor } = await world(t, [{ url: `${to.url}/hook?token=1`, secret: SECRET }]);
    const { id } = await instance("web", { env: { PASSWORD: "hunter2" } });
    const seq = note(id, "test:named", { why: "so" });
    await hypervisor.delete(id, { actor: "api:ops", cause: "request" });
    await to.when(({ taken }) => taken.length === 5);
    assert.deepEqual(to.taken.map(({ body }) => [body.seq, body.event, body.from, body.to]), [
      [1, "create", null, "Created"],
      [2, "start", "Created", "Running"],
      [3, "test.named", null, null],
      [4, "state", "Running", "Shutdown"],
      [5, "delete", "Shutdown", null],
    ]);
    const { body, headers, path } = to.taken[2];
    const { ts, ...rest } = body;
    assert.ok(Math.abs(Date.parse(ts as string) - Date.now()) < 60_000);
    assert.deepEqual(rest, {
      seq,
      type: "test:named",
      event: "test.named",
      instance: id,
      name: "web",
      from: null,
      to: null,
      actor: "test",
      cause: "request",
      summary: "As the test says",
      detail: { why: "so" },
    });
    assert.equal(to.taken[4].body.actor, "api:ops");
    assert.equal(path, "/hook?token=1");
    assert.equal(headers["dormouse-event"], "test.named");
    assert.equal(headers["dormouse-delivery"], "3");
    assert.equal(headers["content-type"], "application/json");
    assert.ok(to.taken.every(({ raw }) => !raw.includes("hunter2")));
  },
);

test(
  "the signature is HMAC-SHA256 over time and body, and the README's receiver takes it",
  LIMIT,
  async (t) => {
    const to = await receiver(t);
    const port = await freePort();
    const [command, ...flags] = RUNTIME;
    const child = execa(command, [...flags, RECEIVER], {
      env: { SECRET, PORT: String(port) },
      reject: false,
    });
    cleanup(t).defer(async () => {
      process.kill(child.pid!, "SIGKILL");
      await child;
    });
    let printed = "";
    child.stdout.on("data", (data) => printed += data);
    const post = (body: string, signature: string) =>
      fetch(`http://127.0.0.1:${port}`, { method: "POST", body, headers: { "Dormouse-Signature": signature } })
        .then(async (response) => (await response.body?.cancel(), response.status), () => 0);
    await until("the receiver listens", async () => await post("", "") === 401);

    const { instance, note, stats } = await world(t, [
      { url: `http://127.0.0.1:${port}/`, secret: SECRET },
      { url: to.url, secret: SECRET },
    ]);
    const { id } = await instance("web");
    note(id, "test:noted", { why: "größer 🦔" });
    await until("all is sent", () => stats().sent === 3);
    await until("it is printed", () => printed.split("\n").length === 4);
    assert.deepEqual(printed.trim().split("\n").map((line) => JSON.parse(line).instance), [id, id, id]);

    await to.when(({ taken }) => taken.length === 3);
    const { raw, headers } = to.taken[2];
    const signature = String(headers["dormouse-signature"]);
    const [, time] = /^t=(\d+),v1=[0-9a-f]{64}$/.exec(signature)!;
    assert.equal(signature, signatureOf(SECRET, raw, Number(time) * 1000));
    // What OpenSSL makes of the same.
    assert.equal(
      signatureOf("key", "body", 1_500_000),
      "t=1500,v1=2f7c908dea9e9acbd3c834f7a18c0c39ba087a9f0eba576240d2c2ace63e9a03",
    );
    const now = Date.now();
    assert.equal(await post(raw, signature), 204);
    assert.equal(await post(`${raw} `, signature), 401, "another body");
    assert.equal(await post(raw, signatureOf("another", raw, now)), 401, "another secret");
    assert.equal(await post(raw, signatureOf(SECRET, raw, now - 600_000)), 401, "an old one");
  },
);

test("what is logged of a receiver that is not there says why, and no token of its URL", LIMIT, async (t) => {
  const logs = capturedLogs(t);
  const port = await freePort();
  const { instance, stats } = await world(t, [{ url: `http://127.0.0.1:${port}/hook?token=(hid)den#two` }]);
  await instance("web");
  await until("it has failed", () => stats().failed === 1);
  const [line] = logs.filter((each) => each.includes("does not take events"));
  assert.match(line, /\/hook#two.*refused/i);
  assert.equal(stats().url, `http://127.0.0.1:${port}/hook#two`);
  assert.ok(logs.every((each) => !each.includes("den#") && !each.includes("hid")), line);
});

test("a delivery has no signature where there is no secret", LIMIT, async (t) => {
  const to = await receiver(t);
  const { instance } = await world(t, [{ url: to.url }]);
  await instance("web");
  await to.when(({ taken }) => taken.length === 2);
  assert.equal(to.taken[0].headers["dormouse-signature"], undefined);
});

test("a webhook is sent its types only, by the names of actions, notes and events", LIMIT, async (t) => {
  const [a, b] = [await receiver(t), await receiver(t)];
  const { instance, note, clock, stats } = await world(t, [
    { url: a.url, types: ["start", "test:noted"] },
    { url: b.url, types: ["test.named"] },
  ]);
  const { id } = await instance("web");
  for (const type of ["test:noted", "test:named", "test:noted"]) note(id, type);
  await a.when(({ taken }) => taken.length === 3);
  await b.when(({ taken }) => taken.length === 1);
  await passUntil(clock, () => stats(0).backlog === 0 && stats(1).backlog === 0);
  assert.deepEqual(a.seqs, [2, 3, 5]);
  assert.deepEqual(b.seqs, [4]);
});

test("a webhook that is new begins with what happens from then on", LIMIT, async (t) => {
  const to = await receiver(t);
  const first = await world(t, []);
  const { id } = await first.instance("web");
  await first.host.close();
  const { note } = await world(t, [{ url: to.url }], { before: first });
  const seq = note(id);
  await to.when(({ taken }) => taken.length === 1);
  assert.deepEqual(to.seqs, [seq]);
});

test("the config is refused where a URL or a type is wrong, each with what is wrong", LIMIT, async (t) => {
  const bad = ["ftp://example.org", "file:///etc/passwd", "example.org", "", "http://user:secret@example.org"];
  for (const url of bad) assert.equal(v.safeParse(Webhook, { url }).success, false, url);
  const good = v.parse(Webhook, { url: "https://example.org/hook" });
  assert.deepEqual(good, { url: "https://example.org/hook", timeout: 10_000, max_backoff: 300_000 });
  const url = "http://127.0.0.1:1/";
  const cases: [Record<string, unknown>[], RegExp][] = [
    [[{ url: "gopher://example.org" }], /plugins\.journal\.webhook\.0\.url: expected an http or https URL such as/],
    [
      [{ url: "http://a:b@example.org" }],
      /plugins\.journal\.webhook\.0\.url: expected a URL without user and password/,
    ],
    [[{ url, types: [] }], /plugins\.journal\.webhook\.0\.types/],
    [[{ url, tpyes: ["start"] }], /plugins\.journal\.webhook\.0\.tpyes: unknown key \(did you mean "types"\?\)/],
    [
      [{ url, types: ["strat"] }],
      /plugins\.journal\.webhook\.0\.types: unknown type "strat" \(did you mean "start"\?\)/,
    ],
    [[{ url, types: ["health:changed"] }], /unknown type "health:changed"; types of notes are those of the plugins/],
    [[{ url }, { url: "http://127.0.0.1:1" }], /plugins\.journal\.webhook\.1\.url: another webhook has it/],
  ];
  for (const [webhooks, message] of cases) {
    await assert.rejects(world(t, webhooks), { code: "config_invalid", message }, JSON.stringify(webhooks));
  }
});

test("a redirect is a failure, and is not followed", LIMIT, async (t) => {
  const [to, elsewhere] = [await receiver(t), await receiver(t)];
  const logs = capturedLogs(t);
  for (const status of [301, 302, 307, 308]) {
    let redirects = true;
    to.answer = () => redirects ? (response) => response.writeHead(status, { Location: elsewhere.url }).end() : 204;
    const { instance, clock, stats, host } = await world(t, [{ url: `${to.url}/${status}?token=hidden` }]);
    await instance("web");
    await passUntil(clock, () => stats().failed >= 2);
    redirects = false;
    await passUntil(clock, () => stats().sent === 2);
    await host.close();
  }
  assert.equal(elsewhere.requests.length, 0);
  assert.ok(
    logs.some((line) => /warning: Webhook "?http.*\/302"? does not take events: .*redirect/.test(line)),
    logs.join("\n"),
  );
  assert.ok(logs.every((line) => !line.includes("hidden")), "a token is logged");
});

test("an answer is read up to a bound, and one that does not come in time is a failure", LIMIT, async (t) => {
  const to = await receiver(t);
  const { instance, clock, stats } = await world(t, [{ url: to.url, timeout: "5s" }]);
  // It says yes, and then talks without end.
  to.answer = () => (response) => {
    response.writeHead(200);
    const talk = () => {
      while (response.writable && !response.destroyed && response.write("x".repeat(4096)));
      response.once("drain", talk);
    };
    talk();
  };
  await instance("web");
  await until("both are sent", () => stats().sent === 2);
  assert.equal(stats().failed, 0);

  to.answer = () => () => {}; // it never answers
  await instance("late");
  await to.when(({ requests }) => requests.length === 3);
  await clock.pass(4_999);
  assert.equal(stats().failed, 0);
  await clock.pass(1);
  await until("it has failed", () => stats().failed === 1);
  to.answer = () => 200;
  await passUntil(clock, () => stats().sent === 4);
});

test("Retry-After and 410 keep everything from the receiver for a while, max_backoff at the most", LIMIT, async (t) => {
  const to = await receiver(t);
  const { instance, clock, stats } = await world(t, [{ url: to.url, max_backoff: "100s" }]);
  const cases: [number, Record<string, string>, number][] = [
    [429, { "Retry-After": "50" }, 50_000],
    [503, { "Retry-After": "86400" }, 100_000],
    [410, {}, 100_000],
  ];
  let sent = 0;
  for (const [status, headers, wait] of cases) {
    to.answer = () => (response) => response.writeHead(status, headers).end();
    await instance(`web-${status}`);
    const failed = stats().failed;
    await until("it has failed", () => stats().failed === failed + 1);
    to.answer = () => 204;
    const asked = to.requests.length;
    await instance(`other-${status}`);
    await clock.pass(wait - 1);
    await settle();
    assert.equal(to.requests.length, asked, `${status}: it is asked too soon`);
    await clock.pass(1);
    sent += 4;
    await passUntil(clock, () => stats().sent === sent);
  }
});

test("retryAfter() reads seconds and dates, and nothing else", () => {
  const now = Date.UTC(2030, 0, 1);
  assert.equal(retryAfter("120", now), 120_000);
  assert.equal(retryAfter("Tue, 01 Jan 2030 00:00:30 GMT", now), 30_000);
  assert.equal(retryAfter("Tue, 01 Jan 2020 00:00:00 GMT", now), 0);
  for (const value of [null, "soon", "-1", "1.5s"]) assert.equal(retryAfter(value, now), undefined, String(value));
});

test("the README shows the receiver that these tests run", () => {
  const readme = readFileSync(`${ROOT}/README.md`, "utf8");
  if (!/dormouse-signature/i.test(readme)) return;
  const [, code] = /^\/\/.*\n([^]*)$/.exec(readFileSync(RECEIVER, "utf8"))!;
  assert.ok(readme.includes(code.trim()), "the README has another receiver");
});
