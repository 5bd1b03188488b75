import assert from "node:assert/strict";
import { test } from "node:test";
import { execa } from "execa";
import { cleanup, ROOT, RUNTIME, temporaryFolder } from "../helpers.ts";
import { gate } from "../hypervisor/scripted.ts";
import { apiHost, TalkingDriver } from "./support.ts";

const BODY = { name: "web", image: "any" };
const KEY = { "Idempotency-Key": "order-66" };

test("POST /instances with one key twice makes one instance and gives one answer", async (t) => {
  const { call, hypervisor } = await apiHost(t);
  const first = await call("POST", "/instances", BODY, KEY);
  const second = await call("POST", "/instances", BODY, KEY);
  assert.equal(first.status, 201);
  assert.deepEqual([second.status, second.body], [201, first.body]);
  assert.equal(hypervisor.list().length, 1);
  // Without a key, and with another one, it is another request.
  assert.equal((await call("POST", "/instances", BODY)).body.code, "name_conflict");
  const other = await call("POST", "/instances", { ...BODY, name: "b" }, { "Idempotency-Key": "order-67" });
  assert.equal(other.status, 201);
});

test("POST /instances joins a creation with the same key that is under way", async (t) => {
  const { call, driver, hypervisor } = await apiHost(t);
  const slow = gate();
  driver.script.start = slow.script;
  const first = call("POST", "/instances", BODY, KEY);
  await slow.arrived;
  const second = call("POST", "/instances", BODY, KEY);
  const conflict = await call("POST", "/instances", { ...BODY, name: "other" }, KEY);
  assert.deepEqual([conflict.status, conflict.body.code], [409, "idempotency_conflict"]);
  slow.open();
  const [a, b] = await Promise.all([first, second]);
  assert.deepEqual([a.status, b.status, b.body], [201, 201, a.body]);
  assert.equal(hypervisor.list().length, 1);
  assert.equal(driver.calls.filter((name) => name === "create").length, 1);
});

test("a creation that ran into the request timeout is joined by the retry", async (t) => {
  const { call, driver, hypervisor } = await apiHost(t, { table: { request_timeout: "2s" } });
  const slow = gate();
  driver.script.start = slow.script;
  assert.equal((await call("POST", "/instances", BODY, KEY)).body.code, "request_timeout");
  let retry = call("POST", "/instances", BODY, KEY);
  slow.open();
  // On a slow machine the retry may run into it as well.
  for (let tries = 1; tries < 5 && (await retry).body.code === "request_timeout"; tries++) {
    retry = call("POST", "/instances", BODY, KEY);
  }
  assert.equal((await retry).status, 201);
  assert.equal(hypervisor.list().length, 1);
});

test("a key is refused with another body", async (t) => {
  const { call } = await apiHost(t);
  await call("POST", "/instances", BODY, KEY);
  const reply = await call("POST", "/instances", { ...BODY, image: "other" }, KEY);
  assert.deepEqual([reply.status, reply.body.code], [409, "idempotency_conflict"]);
});

test("a refusal is kept, and what failed on our side is not", async (t) => {
  const { call, driver } = await apiHost(t);
  await call("POST", "/instances", BODY);
  const refused = await call("POST", "/instances", BODY, KEY);
  assert.equal(refused.body.code, "name_conflict");
  await call("DELETE", "/instances/web");
  assert.deepEqual((await call("POST", "/instances", BODY, KEY)).body, refused.body);

  const key = { "Idempotency-Key": "second" };
  driver.script.start = () => Promise.reject(new Error("no room"));
  assert.equal((await call("POST", "/instances", BODY, key)).status, 500);
  delete driver.script.start;
  assert.equal((await call("POST", "/instances", BODY, key)).status, 201);
});

test("keys of different tokens are different keys", async (t) => {
  const tokens = ["one", "two"].map((name) => ({ name, token: `${name}-0123456789abcdef` }));
  const { call } = await apiHost(t, { table: { tokens } });
  const as = (name: string) => ({ ...KEY, Authorization: `Bearer ${name}-0123456789abcdef` });
  assert.equal((await call("POST", "/instances", BODY, as("one"))).status, 201);
  assert.equal((await call("POST", "/instances", BODY, as("two"))).body.code, "name_conflict");
});

test("an answer outlives a restart of the host, and its instance", async (t) => {
  const folder = temporaryFolder(t);
  const before = await apiHost(t, { folder });
  const first = await before.call("POST", "/instances", BODY, KEY);
  await before.call("DELETE", "/instances/web");
  await before.host.close();
  const { call, hypervisor } = await apiHost(t, { folder });
  assert.deepEqual((await call("POST", "/instances", BODY, KEY)).body, first.body);
  assert.deepEqual(hypervisor.list(), []);
});

for (const point of ["create", "start"]) {
  test(`a key leads to at most one instance after the host was killed in ${point}`, { timeout: 300_000 }, async (t) => {
    const folder = temporaryFolder(t);
    const [command, ...flags] = RUNTIME;
    const child = execa(command, [...flags, `${ROOT}/test/api/crash.ts`, folder, point], {
      reject: false,
      buffer: { stdout: false },
    });
    let url = "";
    for await (const line of child.iterable({ from: "stdout" })) {
      url = String(line);
      const init = {
        method: "POST",
        body: JSON.stringify(BODY),
        headers: { ...KEY, "Content-Type": "application/json" },
      };
      await assert.rejects(fetch(`${url}/instances`, init));
    }
    const { signal, stderr } = await child;
    assert.deepEqual([url.startsWith("http://127.0.0.1:"), signal], [true, "SIGKILL"], stderr);

    const { call, hypervisor } = await apiHost(t, { folder, driver: new TalkingDriver() });
    const found = hypervisor.list();
    const reply = await call("POST", "/instances", BODY, KEY);
    assert.equal(reply.status, 201, JSON.stringify(reply.body));
    assert.equal(hypervisor.list().length, 1);
    // One that got so far that it is kept is the answer; of one that did not, nothing is left and the key is free.
    if (point === "start") assert.equal(found.length, 1);
    if (found.length === 1) assert.equal(reply.body.id, found[0].id);
    assert.equal((await call("POST", "/instances", BODY, KEY)).body.id, reply.body.id);
  });
}

test("a key is forgotten after 24 hours", async (t) => {
  const { call } = await apiHost(t);
  const day = 24 * 3_600_000;
  t.mock.timers.enable({ apis: ["Date"], now: Date.now() });
  cleanup(t).defer(() => t.mock.timers.reset());
  await call("POST", "/instances", BODY, KEY);
  t.mock.timers.setTime(Date.now() + day - 1);
  assert.equal((await call("POST", "/instances", BODY, KEY)).status, 201);
  t.mock.timers.setTime(Date.now() + 1);
  assert.equal((await call("POST", "/instances", BODY, KEY)).body.code, "name_conflict");
});
