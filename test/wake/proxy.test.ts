import assert from "node:assert/strict";
import { once } from "node:events";
import { test } from "node:test";
import { delay } from "../../plugins/shared/async.ts";
import { capturedLogs, temporaryFolder, until } from "../helpers.ts";
import { gate, ORIGIN } from "../hypervisor/scripted.ts";
import { Machines, open, rest, talk, wakeWorld } from "./world.ts";

const GET = "GET / HTTP/1.1\r\nHost: x\r\n\r\n";

test("a published port leads to the instance while it is awake", async (t) => {
  const logs = capturedLogs(t);
  const { make, driver } = await wakeWorld(t);
  const { port } = await make("web");
  assert.equal(await talk(port, "hello"), "hello");
  assert.equal(driver.calls.includes("restore"), false);
  assert.equal(logs.filter((line) => line.includes("go through the host process")).length, 1, "it says so once");
});

// W2, W3, W9: no failure for 50 first requests at once, one restore.
test("50 connections to a sleeping instance are answered after one restore", async (t) => {
  const { make, driver, hypervisor, events, wake } = await wakeWorld(t);
  const { id, port } = await make("web");
  await hypervisor.standby(id, ORIGIN);
  const texts = Array.from({ length: 50 }, (_, n) => `client ${n}`);
  assert.deepEqual(await Promise.all(texts.map((text) => talk(port, text))), texts);
  assert.equal(driver.calls.filter((call) => call === "restore").length, 1);
  // W5, E8: told apart from a restore that a person asked for.
  const restored = events.find(({ action }) => action === "restore");
  assert.deepEqual([restored?.actor, restored?.cause], ["wake", "port"]);
  const { wakes, failed, refused, held } = wake.stats();
  assert.deepEqual({ wakes, failed, refused, held }, { wakes: 1, failed: 0, refused: 0, held: 0 });
});

// W3: the leader's leaving must not abort the others.
test("the first client's leaving ends neither the wake nor the other's wait", async (t) => {
  const { make, driver, hypervisor, wake } = await wakeWorld(t);
  const { id, port } = await make("web");
  await hypervisor.standby(id, ORIGIN);
  const { arrived, open: pass, script } = gate();
  const up = driver.script.restore!;
  driver.script.restore = async (instance, signal) => (await script(instance, signal), await up(instance, signal));
  const first = await open(t, port);
  await arrived;
  const second = talk(port, "still here");
  await until("both are held", () => wake.stats().held === 2);
  first.resetAndDestroy();
  await until("the first is forgotten", () => wake.stats().held === 1);
  pass();
  assert.equal(await second, "still here");
  assert.equal(driver.calls.filter((call) => call === "restore").length, 1);
});

// W1, W19: readiness is that the port answers, not that the process was started.
test("a connection waits until the port answers, however late after the restore", async (t) => {
  const { make, driver, hypervisor } = await wakeWorld(t);
  const { id, port } = await make("web");
  await hypervisor.standby(id, ORIGIN);
  const up = driver.script.restore!;
  driver.script.restore = (instance, signal) => void delay(300).then(() => up(instance, signal));
  assert.equal(await talk(port, "patience"), "patience");
});

test("either side may end first, and the other direction goes on", async (t) => {
  const { make, driver, hypervisor } = await wakeWorld(t);
  const { id, port } = await make("web");
  driver.serve = (socket) => {
    let text = "";
    socket.on("data", (chunk) => text += chunk);
    socket.on("end", () => socket.end(`got ${text}`));
  };
  assert.equal(await talk(port, "question"), "got question");
  driver.serve = (socket) => {
    socket.end("banner");
    socket.on("data", (chunk) => assert.equal(String(chunk), "after the end"));
    socket.on("end", () => seen.resolve());
  };
  const seen = Promise.withResolvers<void>();
  await hypervisor.standby(id, ORIGIN);
  const client = await open(t, port);
  assert.equal(await rest(client), "banner");
  client.end("after the end");
  await seen.promise;
});

test("big bodies pass both ways at once, held in bounds while one side is slow", async (t) => {
  const { make, hypervisor } = await wakeWorld(t);
  const { id, port } = await make("web");
  await hypervisor.standby(id, ORIGIN);
  const size = 24 * 1024 * 1024;
  const client = await open(t, port);
  let sent = 0;
  const chunk = new Uint8Array(65_536).fill(7);
  const write = () => {
    while (sent < size) {
      sent += chunk.length;
      if (!client.write(chunk)) return void client.once("drain", write);
    }
    client.end();
  };
  write();
  // Nothing is read for a while: what comes back stands in the kernel's buffers and in ours, and so the writer stops.
  await delay(300);
  const before = sent;
  assert.ok(before < size, `${before} bytes were taken while nobody read`);
  let got = 0;
  client.on("data", (data: Uint8Array) => got += data.length);
  await once(client, "end");
  assert.equal(got, size);
});

test("a side that breaks breaks the other", async (t) => {
  const { make, driver, wake } = await wakeWorld(t);
  const { port } = await make("web");
  driver.serve = (socket) => void socket.once("data", () => socket.resetAndDestroy());
  assert.equal(await talk(port, "break"), "ECONNRESET");
  const left = Promise.withResolvers<unknown>();
  driver.serve = (socket) => void socket.once("data", () => client.resetAndDestroy()).once("close", left.resolve);
  const client = await open(t, port);
  client.write("break");
  assert.equal(await left.promise, true, "its socket closed with an error");
  await until("nothing is left of it", () => wake.stats().piped === 0);
});

// W13, W17, W20: told as an answer at once, with nothing of the reason in it, and not again and again.
test("a failed wake is answered with 503, and then backs off", async (t) => {
  const { make, driver, hypervisor, wake, host } = await wakeWorld(t);
  const { id, port } = await make("web");
  await hypervisor.standby(id, ORIGIN);
  const up = driver.script.restore!;
  driver.script.restore = () => Promise.reject(new Error("secret reason"));
  const done: (string | null)[] = [];
  host.hooks.on("wake:done", ({ error }) => void done.push(error));
  // The pause is over when this says so.
  const at = performance.now();
  const frozen = t.mock.method(performance, "now", () => at);
  t.after(() => frozen.mock.restore());
  const expected =
    "HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";
  assert.equal(await talk(port, GET), expected);
  assert.equal(await talk(port, GET), expected, "while it backs off");
  assert.equal(await talk(port, "not http"), "", "closed without a word");
  assert.equal(driver.calls.filter((call) => call === "restore").length, 1);
  assert.match(String(done), /secret reason/);
  assert.equal(done.length, 1);
  assert.deepEqual([wake.stats().failed, wake.stats().refused], [1, 3]);
  // Whoever brings it back ends the pause.
  driver.script.restore = up;
  await hypervisor.restore(id, ORIGIN);
  await hypervisor.standby(id, ORIGIN);
  assert.equal(await talk(port, "again"), "again");
});

// W8, W13: the wake has its own limit, and a status of its own.
test("a wake that takes too long is answered with 504, and goes on", async (t) => {
  const { make, driver, hypervisor } = await wakeWorld(t);
  const { id, port } = await make("web", { timeout: "150ms" });
  await hypervisor.standby(id, ORIGIN);
  const { open: pass, script } = gate();
  const up = driver.script.restore!;
  driver.script.restore = async (instance, signal) => (await script(instance, signal), await up(instance, signal));
  assert.match(await talk(port, GET), /^HTTP\/1\.1 504 Gateway Timeout\r\nRetry-After: 1\r\n/);
  pass();
  await until("it runs all the same", () => hypervisor.find(id)?.state === "Running");
  // That long it may take now, too.
  await until("it serves", async () => await talk(port, "hello") === "hello");
});

test("connections past the bounds are refused at once, those within are served", async (t) => {
  const { make, driver, hypervisor, wake } = await wakeWorld(t, { table: { max_held_per_instance: 2, max_held: 3 } });
  const [a, b] = [await make("a"), await make("b")];
  for (const { id } of [a, b]) await hypervisor.standby(id, ORIGIN);
  const { open: pass, script } = gate();
  const up = driver.script.restore!;
  driver.script.restore = async (instance, signal) => (await script(instance, signal), await up(instance, signal));
  const held = [talk(a.port, "1"), talk(a.port, "2")];
  await until("two are held", () => wake.stats().held === 2);
  assert.match(await talk(a.port, GET), /^HTTP\/1\.1 503 /, "the third of one instance");
  held.push(talk(b.port, "3"));
  await until("three are held", () => wake.stats().held === 3);
  assert.match(await talk(b.port, GET), /^HTTP\/1\.1 503 /, "the fourth of all");
  pass();
  assert.deepEqual(await Promise.all(held), ["1", "2", "3"]);
});

test("an instance is not woken when its policy, its state or a person says so", async (t) => {
  const { make, driver, hypervisor } = await wakeWorld(t);
  const off = await make("off", { enabled: false });
  assert.equal(await talk(off.port, "awake"), "awake", "its port works");
  await hypervisor.standby(off.id, ORIGIN);
  assert.match(await talk(off.port, GET), /^HTTP\/1\.1 503 /);
  const stopped = await make("stopped");
  await hypervisor.stop(stopped.id, ORIGIN);
  assert.match(await talk(stopped.port, GET), /^HTTP\/1\.1 503 /);
  const paused = await make("paused");
  await hypervisor.pause(paused.id, ORIGIN);
  assert.match(await talk(paused.port, GET), /^HTTP\/1\.1 503 /);
  // "Never act on Unknown": it may be anything.
  const unknown = await make("unknown");
  driver.machines.set(unknown.id, { state: "Unknown", error: "no answer" });
  hypervisor.changed(unknown.id, "test");
  await until("it is Unknown", () => hypervisor.find(unknown.id)?.state === "Unknown");
  assert.match(await talk(unknown.port, GET), /^HTTP\/1\.1 503 /);
  assert.deepEqual(driver.calls.filter((call) => call === "restore" || call === "resume"), []);
  assert.equal(driver.calls.filter((call) => call === "start").length, 4);
});

test("a stopped instance is started by a connection when start_on_demand says so", async (t) => {
  const { make, hypervisor, events } = await wakeWorld(t, { table: { start_on_demand: true } });
  const { id, port } = await make("web");
  const never = await make("never", { start_on_demand: false });
  for (const each of [id, never.id]) await hypervisor.stop(each, ORIGIN);
  assert.equal(await talk(port, "hello"), "hello");
  assert.equal(events.filter(({ action, actor }) => action === "start" && actor === "wake").length, 1);
  assert.match(await talk(never.port, GET), /^HTTP\/1\.1 503 /);
});

// R1, R2, R5, R7, R8: whenever it comes in the course of a standby, it aborts it or waits for the wake after it.
test("a connection at any point of a standby is served", async (t) => {
  const { make, driver, hypervisor } = await wakeWorld(t);
  const { id, port } = await make("web");
  const down = driver.script.standby!;
  for (const point of ["before", "within", "after"]) {
    const { arrived, open: pass, script } = gate();
    driver.script.standby = async (instance, signal) => {
      if (point !== "after") return await script(instance, signal);
      await down(instance, signal);
      // As a driver has to: an abort puts it back to running.
      await Promise.resolve(script(instance, signal)).catch(() => driver.open(instance));
    };
    const sleeping = hypervisor.standby(id, ORIGIN).then(() => "asleep", (error) => error.code);
    if (point !== "before") await arrived;
    const answer = talk(port, point);
    assert.equal(await answer, point);
    pass();
    assert.equal(await sleeping, "aborted");
    assert.equal(hypervisor.find(id)?.state, "Running");
  }
});

// R3: what only memory knows is gone with the host.
test("a sleeping instance is woken by the host that comes next", async (t) => {
  const folder = temporaryFolder(t);
  const driver = new Machines();
  const first = await wakeWorld(t, { folder, driver });
  const { id, port } = await first.make("web");
  await first.hypervisor.standby(id, ORIGIN);
  await first.host.close();
  assert.equal(await talk(port, "nobody"), "ECONNREFUSED");
  const second = await wakeWorld(t, { folder, driver });
  assert.equal(await talk(port, "somebody"), "somebody");
  assert.equal(second.hypervisor.find(id)?.state, "Running");
});

// W14: what is under way when the host closes may end, what waits is told.
test("closing lets connections end and refuses those that wait", async (t) => {
  const { make, driver, hypervisor, host, wake } = await wakeWorld(t);
  const [awake, asleep] = [await make("awake"), await make("asleep")];
  const client = await open(t, awake.port);
  client.write("one ");
  await once(client, "data");
  await hypervisor.standby(asleep.id, ORIGIN);
  const { open: pass, script } = gate();
  driver.script.restore = script;
  const waiting = talk(asleep.port, GET);
  await until("it is held", () => wake.stats().held === 1);
  const closing = host.close();
  assert.match(await waiting, /^HTTP\/1\.1 503 /);
  pass();
  client.end("two");
  assert.equal(await rest(client), "two");
  await closing;
});

test("a port is bound with its instance and free again after it", async (t) => {
  const { make, hypervisor } = await wakeWorld(t);
  const { id, port } = await make("web");
  await hypervisor.delete(id, ORIGIN);
  await until("nobody listens", async () => await talk(port, "x") === "ECONNREFUSED");
});
