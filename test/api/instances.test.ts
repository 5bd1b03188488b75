import assert from "node:assert/strict";
import { test } from "node:test";
import { cleanup } from "../helpers.ts";
import { apiHost, type Body } from "./support.ts";

const BODY = { name: "web", image: "any" };

test("GET /instances is a bare list, filtered by state and by every tag given", async (t) => {
  const { call } = await apiHost(t);
  assert.deepEqual((await call("GET", "/instances")).body as unknown, []);
  await call("POST", "/instances", { ...BODY, name: "a", tags: { team: "x", env: "prod" } });
  await call("POST", "/instances", { ...BODY, name: "b", tags: { team: "x", "dotted.key": "é [1]" } });
  await call("POST", "/instances", { ...BODY, name: "c" });
  await call("POST", "/instances/b/stop");
  const names = async (query: string) => {
    const { body } = await call("GET", `/instances${query}`);
    return (body as unknown as Body[]).map(({ name }) => name).toSorted();
  };
  assert.deepEqual(await names(""), ["a", "b", "c"]);
  assert.deepEqual(await names("?state=Running"), ["a", "c"]);
  assert.deepEqual(await names("?tags[team]=x"), ["a", "b"]);
  assert.deepEqual(await names("?tags%5Bteam%5D=x&tags[env]=prod"), ["a"]);
  assert.deepEqual(await names("?tags[team]=x&state=Stopped"), ["b"]);
  assert.deepEqual(await names(`?tags[dotted.key]=${encodeURIComponent("é [1]")}`), ["b"]);
  assert.deepEqual(await names("?tags[team]=y"), []);
  assert.deepEqual(await names("?tags[toString]=x"), []);
  // Valibot leaves these out of a record, and the list would be that of a filter less.
  for (const key of ["__proto__", "constructor", "prototype"]) {
    assert.equal((await call("GET", `/instances?tags[${key}]=x`)).body.code, "invalid_request", key);
  }
});

test("an instance reads the same in a list, alone and as the registry shows it", async (t) => {
  // Before the host, which keeps the clock that it finds.
  t.mock.timers.enable({ apis: ["Date"], now: Date.now() });
  cleanup(t).defer(() => t.mock.timers.reset());
  const { call, hypervisor } = await apiHost(t);
  await call("POST", "/instances", { ...BODY, env: { TEXT: '"é\u2028' } });
  await call("POST", "/instances", { ...BODY, name: "slept" });
  t.mock.timers.setTime(Date.now() + 1234);
  await call("POST", "/instances/slept/standby");
  t.mock.timers.setTime(Date.now() + 1000);
  const list = (await call("GET", "/instances")).body as unknown as Body[];
  assert.equal(list.length, 2);
  for (const shown of list) {
    assert.deepEqual(shown, hypervisor.present(hypervisor.find(shown.id)!));
    assert.deepEqual(shown, (await call("GET", `/instances/${shown.id}`)).body);
  }
  const slept = list.find(({ name }) => name === "slept")!;
  const { running, standby } = slept.phase_durations_ms as Record<string, number>;
  assert.deepEqual([running, standby], [1234, 1000]);
});

test("an instance is found by id, name and a prefix that fits no other", async (t) => {
  const { call, hypervisor } = await apiHost(t);
  const first = (await call("POST", "/instances", BODY)).body;
  assert.equal((await call("GET", `/instances/${first.id}`)).body.name, "web");
  assert.equal((await call("GET", "/instances/web")).body.id, first.id);
  assert.equal((await call("GET", `/instances/${first.id.slice(0, 8)}`)).body.id, first.id);
  // Ids begin with one of 26 letters, so of 27 instances two share a prefix.
  for (let i = 0; i < 26; i++) await call("POST", "/instances", { ...BODY, name: `other-${i}` });
  const letters = hypervisor.list().map(({ id }) => id[0]);
  const shared = letters.find((letter, i) => letters.indexOf(letter) !== i)!;
  const reply = await call("GET", `/instances/${shared}`);
  assert.deepEqual([reply.status, reply.body.code], [409, "ambiguous"]);
});

test("actions take an empty body, none, and none that says it is JSON", async (t) => {
  const { call } = await apiHost(t);
  await call("POST", "/instances", BODY);
  const bodies: [unknown, Record<string, string>?][] = [
    [undefined],
    [{}],
    ["", { "Content-Type": "application/json" }],
  ];
  for (const [body, headers] of bodies) {
    const steps = [["pause", "Paused"], ["resume", "Running"], ["standby", "Standby"], ["restore", "Running"]];
    for (const [action, state] of [...steps, ["stop", "Stopped"], ["start", "Running"]]) {
      const sent = ["standby", "start"].includes(action) ? body : undefined;
      const reply = await call("POST", `/instances/web/${action}`, sent, sent === undefined ? {} : headers);
      assert.deepEqual([reply.status, reply.body.state], [200, state], `${action} ${JSON.stringify(body)}`);
    }
  }
  assert.equal((await call("POST", "/instances/web/standby", { compression_delay: "30s" })).body.state, "Standby");
});

test("start replaces the command for good, and fork copies", async (t) => {
  const { call } = await apiHost(t);
  await call("POST", "/instances", { ...BODY, cmd: ["one"] });
  await call("POST", "/instances/web/stop");
  const started = await call("POST", "/instances/web/start", { cmd: ["two"] });
  assert.deepEqual(started.body.cmd, ["two"]);
  const refused = await call("POST", "/instances/web/fork", { name: "copy" });
  assert.deepEqual([refused.status, refused.body.code], [409, "invalid_state"]);
  const forked = await call("POST", "/instances/web/fork", { name: "copy", from_running: true });
  assert.deepEqual([forked.status, forked.body.name, forked.body.cmd], [201, "copy", ["two"]]);
});

test("DELETE answers 204 and nothing, and with graceful_shutdown stops first", async (t) => {
  const { call, driver } = await apiHost(t);
  await call("POST", "/instances", BODY);
  const plain = await call("DELETE", "/instances/web");
  assert.deepEqual([plain.status, plain.body.text], [204, ""]);
  assert.ok(!driver.calls.includes("stop"));
  await call("POST", "/instances", BODY);
  assert.equal((await call("DELETE", "/instances/web?graceful_shutdown=true")).status, 204);
  assert.deepEqual(driver.calls.slice(-2), ["stop", "delete"]);
  assert.equal((await call("DELETE", "/instances/web")).status, 404);
});
