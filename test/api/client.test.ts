import assert from "node:assert/strict";
import { test, type TestContext } from "node:test";
import Hypeman, { APIError } from "@onkernel/hypeman";
import type { Plugin } from "../../main.ts";
import apiPlugin from "../../plugins/api/mod.ts";
import hypervisorPlugin from "../../plugins/hypervisor/mod.ts";
import processPlugin from "../../plugins/process/mod.ts";
import storePlugin from "../../plugins/store.ts";
import { cleanup, startWith } from "../helpers.ts";

const TOKEN = "client-test-0123456789";

/** The published client, unchanged, against a whole host that runs real processes. */
async function clientOf(t: TestContext): Promise<Hypeman> {
  const host = await startWith(t, [storePlugin, hypervisorPlugin, processPlugin, apiPlugin] as Plugin[], {
    tables: {
      // No cgroups: what the machine grants is no matter here.
      process: { grace: "2s", cgroup_parent: "" },
      api: { listen: "127.0.0.1:0", access_log: false, tokens: [{ name: "client", token: TOKEN }] },
    },
  });
  return new Hypeman({ apiKey: TOKEN, baseURL: host.use("api").url, maxRetries: 0 });
}

// The published types know neither the driver nor the command of a process, but the client sends what it is given.
const BODY = { name: "web", image: "host", cmd: ["sh", "-c", "echo ready; echo done >&2; exec sleep 300"] };

test("@onkernel/hypeman takes an instance through its life", { timeout: 90_000 }, async (t) => {
  const { instances } = await clientOf(t);
  const made = await instances.create({ ...BODY, tags: { team: "a" }, env: { GREETING: "hi" } });
  // Gone already, where the test got to its end.
  cleanup(t).defer(() => instances.delete(made.id).catch(() => {}));
  assert.equal(made.state, "Running");
  assert.equal(made.hypervisor as string, "process");
  const { timed_out, state } = await instances.wait("web", { state: "Running", timeout: "10s" });
  assert.deepEqual([timed_out, state], [false, "Running"]);

  assert.deepEqual((await instances.list()).map(({ name }) => name), ["web"]);
  assert.equal((await instances.list({ state: "Running", tags: { team: "a" } })).length, 1);
  assert.equal((await instances.list({ tags: { team: "b" } })).length, 0);
  assert.equal((await instances.list({ state: "Standby" })).length, 0);
  assert.equal((await instances.get(made.id.slice(0, 12))).id, made.id);
  const updated = await instances.update("web", { env: { GREETING: "hello" }, ttl: "1h" });
  assert.deepEqual(updated.env, { GREETING: "hello" });
  assert.ok(updated.expires_at);

  const lines: string[] = [];
  for await (const line of await instances.logs("web", { follow: true, tail: 10 })) {
    lines.push(line);
    if (lines.length === 2) break;
  }
  assert.deepEqual(lines.toSorted(), ["done", "ready"]);
  const all: string[] = [];
  for await (const line of await instances.logs("web")) all.push(line);
  assert.equal(all.length, 2);

  const stats = await instances.stats("web");
  assert.deepEqual([stats.instance_id, stats.instance_name], [made.id, "web"]);
  assert.ok(stats.memory_rss_bytes > 0);
  const root = await instances.stat("web", { path: "/", follow_links: true });
  assert.deepEqual([root.exists, root.is_dir], [true, true]);
  assert.equal((await instances.stat("web", { path: "/nowhere/at/all" })).exists, false);

  assert.equal((await instances.standby("web")).state, "Standby");
  assert.equal((await instances.standby("web", { compression: { enabled: false } })).state, "Standby");
  assert.equal((await instances.restore("web")).state, "Running");
  const stopped = await instances.stop("web");
  assert.equal(stopped.state, "Stopped");
  assert.ok(stopped.phase_durations_ms!.running > 0);
  assert.equal((await instances.start("web", { cmd: ["sleep", "200"] })).state, "Running");
  await instances.delete("web", { graceful_shutdown: true });
  await assert.rejects(instances.get("web"), (error) => error instanceof APIError && error.status === 404);
});

test("@onkernel/hypeman forks, or is told that the driver cannot", { timeout: 300_000 }, async (t) => {
  const { instances, capabilities } = await clientOf(t);
  const source = await instances.create(BODY);
  cleanup(t).defer(() => instances.delete(source.id));
  await instances.stop("web");
  const runtime = (await capabilities.get()).runtimes.find(({ name }) => name === "process")!;
  const fork = instances.fork("web", { name: "web-2", target_state: "Running" });
  if (!runtime.features.includes("fork")) {
    await assert.rejects(fork, (error) => error instanceof APIError && error.status === 501);
    return;
  }
  const copy = await fork;
  cleanup(t).defer(() => instances.delete(copy.id));
  assert.equal(copy.state, "Running");
  assert.notEqual(copy.id, source.id);
});

test("@onkernel/hypeman asks the host what it is", async (t) => {
  const { health, capabilities, resources } = await clientOf(t);
  assert.equal((await health.check()).status, "ok");
  const { runtimes, default_runtime, host, features } = await capabilities.get();
  assert.deepEqual(default_runtime, { name: "process", available: true });
  assert.ok(runtimes.some(({ name, available }) => name === "process" && available));
  assert.ok(["amd64", "arm64"].includes(host.arch));
  assert.ok(features.includes("instances"));
  const { cpu, memory, disk } = await resources.get();
  for (const { type, capacity } of [cpu, memory, disk]) assert.ok(capacity > 0, type);
});

test("@onkernel/hypeman sees errors by status and code", async (t) => {
  const client = await clientOf(t);
  const refused = async (work: Promise<unknown>, status: number, code: string) =>
    await assert.rejects(work, (error) => {
      assert.ok(error instanceof APIError);
      assert.deepEqual([error.status, (error.error as { code: string }).code], [status, code]);
      return true;
    });
  await refused(client.instances.get("nobody"), 404, "not_found");
  await refused(client.instances.create({ name: "Bad Name", image: "host" }), 400, "invalid_name");
  await refused(client.instances.wait("nobody", { state: "Running" }), 404, "not_found");
  await refused(client.withOptions({ apiKey: "wrong" }).instances.list(), 401, "unauthorized");
});
