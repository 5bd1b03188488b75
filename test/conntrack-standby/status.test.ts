import assert from "node:assert/strict";
import { test, type TestContext } from "node:test";
import HypemanClient from "@onkernel/hypeman";
import * as v from "valibot";
import { definePlugin, type Plugin, Veto } from "../../main.ts";
import apiPlugin from "../../plugins/api/mod.ts";
import { Status } from "../../plugins/conntrack-standby/status.ts";
import { temporaryFolder } from "../helpers.ts";
import { gate, ScriptedDriver } from "../hypervisor/scripted.ts";
import { ManualClock, settle } from "../clock.ts";
import { flow, ORIGIN, world, type WorldOptions } from "./world.ts";

const START = Date.UTC(2030, 0, 1);
const at = (seconds: number) => new Date(START + seconds * 1_000).toISOString();

async function served(t: TestContext, options: WorldOptions = {}) {
  const tables = { api: { listen: "127.0.0.1:0", access_log: false } };
  const made = await world(t, { ...options, plugins: [apiPlugin as Plugin, ...options.plugins ?? []], tables });
  const { url } = made.host.use("api");
  const ask = async (method: string, path: string, body?: unknown) => {
    const headers = body === undefined ? undefined : { "Content-Type": "application/json" };
    const init = { method, ...(headers && { headers, body: JSON.stringify(body) }) };
    const response = await fetch(`${url}/instances/${path}`, init);
    const answer = await response.json();
    if (response.status === 200) v.parse(Status, answer);
    return { status: response.status, answer };
  };
  const status = async (name = "web") => (await ask("GET", `${name}/auto-standby/status`)).answer;
  const hold = (body?: unknown, name = "web") => ask("POST", `${name}/auto-standby/hold`, body);
  const release = () => ask("DELETE", "web/auto-standby/hold");
  return { ...made, url, ask, status, hold, release };
}

test("the status tells the countdown of an instance that nobody uses", async (t) => {
  const { instance, clock, status } = await served(t, { table: { min_awake: "0s" } });
  await instance();
  await clock.pass(4_000);
  assert.deepEqual(await status(), {
    supported: true,
    configured: true,
    enabled: true,
    eligible: true,
    status: "idle_countdown",
    reason: "idle_timeout_not_elapsed",
    active_inbound_connections: 0,
    tracking_mode: "conntrack_events_v4_v6_tcp",
    idle_timeout: "10s",
    idle_since: at(0),
    last_inbound_activity_at: null,
    next_standby_at: at(10),
    hold_until: null,
    countdown_remaining: "6s",
    refused: null,
  });
});

test("the status names what is in the way, the first thing first", async (t) => {
  const { instance, clock, status, kernel, hypervisor } = await served(t);
  const { id } = await instance("web", undefined);
  const told = async () => [(await status()).status, (await status()).reason].join(" ");
  await hypervisor.update(id, { auto_standby: null }, ORIGIN);
  assert.equal(await told(), "disabled policy_missing");
  await hypervisor.update(id, { auto_standby: { enabled: false } }, ORIGIN);
  assert.equal(await told(), "disabled policy_disabled");
  await hypervisor.update(id, { auto_standby: { enabled: true, idle_timeout: "10s" } }, ORIGIN);
  assert.equal(await told(), "idle_countdown idle_timeout_not_elapsed");
  kernel.set(flow());
  const { active_inbound_connections, last_inbound_activity_at, next_standby_at, idle_since } = await status();
  assert.deepEqual([active_inbound_connections, last_inbound_activity_at, next_standby_at, idle_since], [
    1,
    at(0),
    null,
    null,
  ]);
  assert.equal(await told(), "active active_inbound_connections");
  kernel.lose();
  assert.equal(await told(), "error observer_error");
  kernel.connect();
  kernel.destroy(flow());
  await clock.pass(10_000);
  assert.equal(await told(), "ineligible instance_not_running");
  await hypervisor.stop(id, ORIGIN);
  assert.equal(await told(), "ineligible instance_not_running");
  await hypervisor.create({
    name: "alone",
    image: "any",
    network: { enabled: false },
    auto_standby: { enabled: true, idle_timeout: "1s" },
  }, ORIGIN);
  const alone = await status("alone");
  assert.deepEqual([alone.status, alone.reason, alone.eligible], ["ineligible", "network_disabled", false]);
});

test("the status says that a driver has no standby", async (t) => {
  const driver = new ScriptedDriver();
  (driver.features as Set<string>).delete("standby");
  const { instance, status, clock, state } = await served(t, { driver });
  const { id } = await instance();
  const { supported, status: told, reason } = await status();
  assert.deepEqual([supported, told, reason], [false, "unsupported", "unsupported_platform"]);
  await clock.pass(60_000);
  assert.equal(state(id), "Running");
});

test("the status shows the guard that refused, with its reason", async (t) => {
  const guarding = definePlugin({
    name: "load",
    setup: (host) => {
      host.hooks.guard("before:standby", () => {
        throw new Veto("cpu_load", "CPU is at 80 %");
      });
    },
  });
  const { instance, clock, status } = await served(t, { plugins: [guarding as Plugin] });
  await instance();
  await clock.pass(10_000);
  const { refused, idle_since, next_standby_at } = await status();
  const { kind, plugin, code, message } = refused;
  assert.deepEqual([kind, plugin, code, message], ["vetoed", "load", "cpu_load", "CPU is at 80 %"]);
  assert.deepEqual([idle_since, next_standby_at], [at(0), at(20)]);
});

// I9: the last hold wins; I24: whoever works on, without a connection, holds.
test("a hold keeps an instance awake, the last one counts, and it can be released", async (t) => {
  const { instance, clock, hold, release, state, status } = await served(t);
  const { id } = await instance();
  assert.equal((await hold()).answer.hold_until, at(10));
  assert.equal((await hold({ duration: "1h" })).answer.hold_until, at(3_600));
  const { answer } = await hold({ duration: "30s" });
  assert.deepEqual([answer.hold_until, answer.next_standby_at, answer.idle_since], [at(30), at(30), at(0)]);
  await clock.pass(29_000);
  assert.equal(state(id), "Running");
  const released = await release();
  assert.equal(released.status, 200);
  assert.equal(released.answer.hold_until, null);
  await clock.pass(1);
  assert.equal(state(id), "Standby");
  assert.equal((await status()).hold_until, null);
});

test("a hold with a wrong duration is refused", async (t) => {
  const { instance, hold } = await served(t);
  await instance();
  for (
    const body of [{ duration: "soon" }, { duration: "0s" }, { duration: "-1m" }, { duration: 5 }, { until: "1m" }]
  ) {
    const { status, answer } = await hold(body);
    assert.deepEqual([status, answer.code], [400, "invalid_request"], JSON.stringify(body));
  }
});

test("a hold of an instance that never sleeps by itself answers with its status", async (t) => {
  const { instance, hold, hypervisor } = await served(t);
  const { id } = await instance("web", { enabled: false });
  const told = [(await hold()).answer.reason];
  await hypervisor.update(id, { auto_standby: null }, ORIGIN);
  told.push((await hold()).answer.reason);
  assert.deepEqual(told, ["policy_disabled", "policy_missing"]);
  assert.equal((await hold(undefined, "nobody")).status, 404);
});

// I7, I8: nobody is told that an instance is held which sleeps, or is on its way, whoever sent it there.
test("a hold that comes too late is refused", async (t) => {
  const { instance, clock, hold, hypervisor, driver } = await served(t);
  const { id } = await instance();
  const refused = async (why: string) => {
    const { status, answer } = await hold();
    assert.deepEqual([status, answer.code], [409, "instance_in_standby"], why);
  };
  const cases = [
    ["standby", (by: Promise<unknown>) => by, () => hypervisor.standby(id, ORIGIN)],
    ["standby", (by: Promise<unknown>) => by, () => clock.pass(10_000)],
    ["stop", (by: Promise<unknown>) => by, () => hypervisor.stop(id, ORIGIN)],
  ] as const;
  for (const [method, , act] of cases) {
    const slow = gate();
    driver.script[method] = slow.script;
    const acting = act();
    await slow.arrived;
    await refused(`${method} under way`);
    slow.open();
    await acting;
    await settle();
    if (method === "standby") {
      await refused("asleep");
      await hypervisor.restore(id, ORIGIN);
    }
  }
  await hypervisor.start(id, ORIGIN);
  await hypervisor.pause(id, ORIGIN);
  await refused("paused");
  await hypervisor.resume(id, ORIGIN);
  assert.equal((await hold()).status, 200);
});

// I8: also while the guards of a standby that somebody asked for still think; a veto lets holds in again.
test("a hold while guards think about a standby that was asked for is refused", async (t) => {
  const { host, instance, hold, hypervisor } = await served(t);
  const { id } = await instance();
  const arrived = Promise.withResolvers<void>();
  const verdict = Promise.withResolvers<void>();
  host.hooks.guard("before:standby", () => {
    arrived.resolve();
    return verdict.promise;
  });
  const acting = assert.rejects(hypervisor.standby(id, ORIGIN), { code: "vetoed" });
  await arrived.promise;
  assert.equal((await hold()).status, 409);
  verdict.reject(new Veto("busy", "a build runs"));
  await acting;
  assert.equal((await hold()).status, 200);
});

// I4, I11: a hold cancels what has not begun.
test("a hold during the dump before a standby, and in the queue, cancels the attempt", async (t) => {
  const { instance, clock, hold, kernel, driver, state, said } = await served(t, { table: { max_concurrent: 1 } });
  const { id } = await instance();
  kernel.duringDump = async () => {
    kernel.duringDump = undefined;
    assert.equal((await hold()).status, 200);
  };
  const { promise: cancelled, resolve } = Promise.withResolvers<void>();
  const passing = clock.pass(10_000);
  const check = () => said().at(-1) === "cancelled hold" ? resolve() : setTimeout(check, 2);
  check();
  await Promise.all([passing, cancelled]);
  assert.equal(state(id), "Running");
  const slow = gate();
  driver.script.standby = slow.script;
  const other = await instance("other", { enabled: true, idle_timeout: "9s" });
  const sleeping = clock.pass(9_500);
  await slow.arrived;
  await sleeping;
  await clock.pass(1_000);
  assert.equal(said().at(-1), "requested ready_for_standby");
  assert.equal((await hold()).status, 200);
  assert.equal(said().at(-1), "cancelled hold");
  slow.open();
  await settle(10);
  assert.deepEqual([state(id), state(other.id)], ["Running", "Standby"]);
});

// S10: holds survive a restart of the host.
test("a hold survives a restart of the host", async (t) => {
  const [folder, clock] = [temporaryFolder(t), new ManualClock()];
  const first = await served(t, { folder, clock });
  const { id } = await first.instance();
  await first.hold({ duration: "1m" });
  await first.host.close();
  const second = await served(t, { folder, clock, driver: new ScriptedDriver(first.driver.machines) });
  assert.equal((await second.status()).hold_until, at(60));
  await clock.pass(59_000);
  assert.equal(second.state(id), "Running");
  await clock.pass(1_000);
  assert.equal(second.state(id), "Standby");
});

test("the published client reads the status and holds", async (t) => {
  const { instance, url } = await served(t);
  await instance();
  const client = new HypemanClient({ apiKey: "unused", baseURL: url });
  const status = await client.instances.autoStandby.status("web");
  assert.deepEqual([status.status, status.idle_timeout], ["idle_countdown", "10s"]);
  assert.equal((await client.instances.autoStandby.hold("web")).hold_until, at(10));
});
