import assert from "node:assert/strict";
import { test } from "node:test";
import { getLogger } from "@logtape/logtape";
import type { Api, ApiRoute, Hypervisor, LogRequest } from "../../main.ts";
import { createApp } from "../../plugins/api/app.ts";
import { Execs } from "../../plugins/api/execs.ts";
import { inspectionRoutes } from "../../plugins/api/routes/inspection.ts";
import { Streams } from "../../plugins/api/sse.ts";
import { cleanup, until } from "../helpers.ts";
import { gate } from "../hypervisor/scripted.ts";
import { type ApiFixture, apiHost, noLog, openStream } from "./support.ts";

const BODY = { name: "web", image: "any" };

async function* linesOf(...lines: string[]): AsyncGenerator<string> {
  for (const line of lines) yield line;
}

/** The routes without a socket between, and a promise of the next request that has begun to wait. */
function inProcess({ host, hypervisor }: ApiFixture, request_timeout: number) {
  const log = getLogger(["dormouse", "api"]);
  const routes: ApiRoute[] = [];
  let arrive = () => {};
  const wait: Hypervisor["wait"] = (...args) => {
    const waiting = hypervisor.wait(...args);
    arrive();
    return waiting;
  };
  const streams = new Streams(log);
  const api: Api = {
    url: "",
    route: (route) => void routes.push(route),
    stream: (call, work) => streams.answer(call, work),
  };
  inspectionRoutes(api, { ...hypervisor, wait }, new Execs(host.hooks));
  const options = { request_timeout, tokens: [], access_log: false };
  const app = createApp(routes, {
    options,
    log,
    closing: new AbortController().signal,
    trusting: true,
    plugins: new Map(),
    answered: () => {},
  });
  const arrival = () => new Promise<void>((resolve) => arrive = resolve);
  return { app, arrival };
}

const turn = () => new Promise<void>((resolve) => setImmediate(resolve));

test("wait answers at once where the instance is there already, or cannot get there", async (t) => {
  const { call } = await apiHost(t);
  await call("POST", "/instances", BODY);
  const there = await call("GET", "/instances/web/wait?state=Running");
  assert.deepEqual(there.body as unknown, { state: "Running", state_error: null, timed_out: false });
  await call("POST", "/instances/web/stop");
  const never = await call("GET", "/instances/web/wait?state=Running");
  assert.deepEqual(never.body as unknown, { state: "Stopped", state_error: null, timed_out: false });
});

// S3: the change comes between asking and waiting, as often as it likes.
test("wait misses no change that happens while it is asked for", async (t) => {
  const { call } = await apiHost(t);
  await call("POST", "/instances", BODY);
  for (let i = 0; i < 20; i++) {
    const wanted = i % 2 === 0 ? "Standby" : "Running";
    const [waited] = await Promise.all([
      call("GET", `/instances/web/wait?state=${wanted}&timeout=10s`),
      call("POST", `/instances/web/${wanted === "Standby" ? "standby" : "restore"}`),
    ]);
    // From Standby, Running is out of reach until somebody asks for it; the answer then is where it is.
    if (waited.body.state !== wanted) assert.deepEqual([wanted, waited.body.state], ["Running", "Standby"]);
    assert.equal(waited.body.timed_out, false);
  }
});

// S4: the time limit of other requests does not cut it, and its own cap of 5 minutes can be reached.
test("wait lasts up to 5 minutes whatever the request timeout", { timeout: 30_000 }, async (t) => {
  const fixture = await apiHost(t);
  await fixture.call("POST", "/instances", BODY);
  const { app, arrival } = inProcess(fixture, 60_000);
  let now = Math.ceil(performance.now()); // whole, so that sums are exact
  t.mock.method(performance, "now", () => now);
  t.mock.timers.enable({ apis: ["setTimeout"] });
  cleanup(t).defer(() => (t.mock.timers.reset(), t.mock.restoreAll()));
  const pass = (ms: number) => {
    now += ms;
    t.mock.timers.tick(ms);
  };
  for (const [timeout, ms] of [["", 60_000], ["&timeout=2m", 120_000], ["&timeout=100h", 300_000]] as const) {
    let answered = false;
    const arrived = arrival();
    const waiting = Promise.resolve(app.request(`/instances/web/wait?state=Standby${timeout}`));
    void waiting.then(() => answered = true);
    await arrived;
    pass(ms - 1);
    await turn();
    assert.equal(answered, false, timeout);
    pass(1);
    const response = await waiting;
    assert.equal(response.status, 200, timeout);
    assert.deepEqual(await response.json(), { state: "Running", state_error: null, timed_out: true }, timeout);
  }
});

test("wait for an instance that is deleted meanwhile is a 404", async (t) => {
  const fixture = await apiHost(t);
  await fixture.call("POST", "/instances", BODY);
  const { app, arrival } = inProcess(fixture, 60_000);
  const arrived = arrival();
  const waiting = app.request("/instances/web/wait?state=Standby");
  await arrived;
  await fixture.call("DELETE", "/instances/web");
  const response = await waiting;
  assert.equal(response.status, 404);
  assert.equal((await response.json()).code, "not_found");
});

test("wait ends when the host closes", async (t) => {
  const { call, host } = await apiHost(t);
  await call("POST", "/instances", BODY);
  const waiting = call("GET", "/instances/web/wait?state=Standby&timeout=5m");
  await call("GET", "/health");
  await host.close();
  const outcome = await waiting.then(({ status }) => status, () => "refused");
  assert.ok([200, 503, "refused"].includes(outcome), String(outcome));
});

// E9: a line longer than any buffer is sent whole.
test("logs streams each line as a JSON string", async (t) => {
  const { call, url, driver } = await apiHost(t);
  await call("POST", "/instances", BODY);
  const long = "€".repeat(1_000_000);
  const lines = ["plain", "", '"quoted" \\', "carriage\rreturn", "\u2028 \u0000 \x1b[31m", "data: x", long];
  const requests: LogRequest[] = [];
  driver.lines = (_instance, request) => (requests.push(request), linesOf(...lines));
  const { response, event } = await openStream(t, `${url}/instances/web/logs?tail=7&source=vmm`);
  assert.equal(response.headers.get("Content-Type"), "text/event-stream");
  assert.equal(response.headers.get("Cache-Control"), "no-cache");
  assert.equal(response.headers.get("X-Accel-Buffering"), "no");
  for (const line of lines) {
    const message = await event();
    assert.deepEqual(Object.keys(message!), ["data"]);
    assert.equal(JSON.parse(message!.data!), line);
  }
  assert.equal(await event(), undefined);
  assert.deepEqual([requests[0].tail, requests[0].source, requests[0].follow], [7, "vmm", false]);
  await openStream(t, `${url}/instances/web/logs`);
  assert.deepEqual([requests[1].tail, requests[1].source, requests[1].follow], [100, "app", false]);
});

test("logs that follow are flushed line by line and end when the client leaves", { timeout: 30_000 }, async (t) => {
  const { call, url, driver } = await apiHost(t);
  await call("POST", "/instances", BODY);
  const written: string[] = [];
  let wake = Promise.withResolvers<void>();
  let ended = false;
  driver.lines = async function* (_instance, { signal }) {
    signal.addEventListener("abort", () => wake.resolve(), { once: true });
    try {
      while (!signal.aborted) {
        for (const line of written.splice(0)) yield line;
        await wake.promise;
        wake = Promise.withResolvers();
      }
    } finally {
      ended = true;
    }
  };
  // The headers are here though no line is.
  const { response, event, leave } = await openStream(t, `${url}/instances/web/logs?follow=true`);
  assert.equal(response.status, 200);
  for (const line of ["one", "two"]) {
    written.push(line);
    wake.resolve();
    assert.equal((await event())!.data, JSON.stringify(line));
  }
  leave();
  await until("the driver to stop following", () => ended);
});

test("logs of a source that is not there are a 404, followed or not", async (t) => {
  const { call, driver } = await apiHost(t);
  await call("POST", "/instances", BODY);
  // deno-lint-ignore require-yield
  driver.lines = async function* () {
    throw noLog();
  };
  for (const query of ["source=vmm", "source=vmm&follow=true"]) {
    const reply = await call("GET", `/instances/web/logs?${query}`);
    assert.deepEqual([reply.status, reply.body.code], [404, "log_not_found"], query);
  }
});

test("logs that break off say so in the stream", async (t) => {
  const { call, url, driver } = await apiHost(t);
  await call("POST", "/instances", BODY);
  driver.lines = async function* () {
    yield "one";
    throw new Error("/secret/disk is gone");
  };
  const { event } = await openStream(t, `${url}/instances/web/logs`);
  assert.equal((await event())!.data, '"one"');
  const failure = await event();
  assert.equal(failure!.event, "error");
  assert.equal(JSON.parse(failure!.data!).code, "internal_error");
  assert.doesNotMatch(failure!.data!, /secret/);
  assert.equal(await event(), undefined);
});

test("stats and stat answer in the contract's shape", async (t) => {
  const { call } = await apiHost(t);
  const { body } = await call("POST", "/instances", { ...BODY, vcpus: 2, size: "2048B" });
  const stats = await call("GET", "/instances/web/stats");
  assert.deepEqual(stats.body as unknown, {
    instance_id: body.id,
    instance_name: "web",
    cpu_seconds: 1.5,
    memory_rss_bytes: 1024,
    memory_vms_bytes: 4096,
    network_rx_bytes: 10,
    network_tx_bytes: 20,
    allocated_vcpus: 2,
    allocated_memory_bytes: 2048,
    memory_utilization_ratio: 0.5,
  });
  await call("POST", "/instances", { ...BODY, name: "free" });
  const free = await call("GET", "/instances/free/stats");
  assert.deepEqual([free.body.allocated_vcpus, free.body.memory_utilization_ratio], [0, null]);
  const link = await call("GET", "/instances/web/stat?path=/etc/x%20y");
  assert.deepEqual([link.body.is_symlink, link.body.link_target], [true, "/etc/x y"]);
  assert.equal((await call("GET", "/instances/web/stat?path=/etc/x&follow_links=true")).body.is_symlink, false);
});

test("exec hands over the command with its bounds and ends when the client leaves", async (t) => {
  const { call, driver, url } = await apiHost(t, { table: { request_timeout: "5s" } });
  await call("POST", "/instances", BODY);
  const request = { command: ["echo", "hi"], env: { A: "1" }, working_dir: "/tmp", timeout: "1m30s" };
  const reply = await call("POST", "/instances/web/exec", request);
  assert.deepEqual([reply.status, reply.body.stdout], [200, "echo hi"]);
  const { signal: _, ...first } = driver.execs[0];
  assert.deepEqual(first, {
    command: ["echo", "hi"],
    env: { A: "1" },
    working_dir: "/tmp",
    timeout_ms: 90_000,
    max_output: 1024 * 1024,
  });
  const leave = new AbortController();
  const headers = { "Content-Type": "application/json" };
  const init = { method: "POST", headers, body: '{"command":["forever"]}', signal: leave.signal };
  const pending = fetch(`${url}/instances/web/exec`, init).catch(() => "left");
  await until("exec under way", () => driver.execs.length === 2);
  assert.equal(driver.execs[1].timeout_ms, 60_000);
  leave.abort();
  assert.equal(await pending, "left");
  await until("exec to be told", () => driver.execs[1].signal!.aborted);
});

test("a client that leaves does not break off an action", async (t) => {
  const { call, driver, url, hypervisor } = await apiHost(t);
  const { body } = await call("POST", "/instances", BODY);
  const slow = gate();
  driver.script.stop = slow.script;
  const leave = new AbortController();
  const pending = fetch(`${url}/instances/web/stop`, { method: "POST", signal: leave.signal }).catch(() => "left");
  await slow.arrived;
  leave.abort();
  assert.equal(await pending, "left");
  slow.open();
  await until("it to be stopped", () => hypervisor.find(body.id)?.state === "Stopped");
});

test("an instance does not fall asleep while a command runs in it, nor is one begun while it does", async (t) => {
  const { call, driver, host } = await apiHost(t);
  await call("POST", "/instances", BODY);
  await call("POST", "/instances", { ...BODY, name: "taken" });
  const standby = () => call("POST", "/instances/web/standby", {});
  const exec = (...command: string[]) => call("POST", "/instances/web/exec", { command });
  const forever = { command: ["forever"], timeout: "1m" };
  const pending = call("POST", "/instances/web/exec", forever).catch(() => {});
  await until("exec under way", () => driver.execs.length === 1);
  const fork = (name: string) => call("POST", "/instances/web/fork", { name, from_running: true });
  for (const refused of [await standby(), await fork("copy"), await call("POST", "/instances/web/pause")]) {
    assert.deepEqual([refused.status, refused.body.code], [409, "vetoed"]);
    assert.deepEqual([refused.body.details.plugin, refused.body.details.code], ["api", "exec_under_way"]);
  }
  assert.equal((await exec("true")).status, 200);
  assert.equal((await standby()).status, 409);
  driver.end();
  await pending;
  // One that came to nothing is in nobody's way.
  assert.equal((await fork("taken")).body.code, "name_conflict");
  assert.equal((await exec("true")).status, 200);
  {
    using _broken = host.hooks.guard("before:standby", () => Promise.reject(new Error("no bed")), { priority: -1 });
    assert.equal((await standby()).body.code, "guard_failed");
  }
  assert.equal((await exec("true")).status, 200);

  {
    const [arrived, open] = [Promise.withResolvers<void>(), Promise.withResolvers<void>()];
    using _thoughtful = host.hooks.guard("before:standby", () => (arrived.resolve(), open.promise), { priority: 10 });
    const overtaken = standby();
    await arrived.promise;
    assert.equal((await call("POST", "/instances/web/restore")).status, 200);
    assert.equal((await overtaken).body.code, "aborted");
    open.resolve();
    await turn();
  }
  assert.equal((await exec("true")).status, 200);

  const slow = gate();
  host.hooks.guard("before:standby", ({ instance, signal }) => slow.script(instance, signal), { priority: -1 });
  const falling = standby();
  await slow.arrived;
  const late = await exec("true");
  assert.deepEqual([late.status, late.body.code], [409, "invalid_state"]);
  assert.match(late.body.message, /it is about to stand still$/);
  slow.open();
  assert.equal((await falling).status, 200);
  await call("POST", "/instances/web/restore");
  assert.equal((await exec("true")).status, 200);
});
