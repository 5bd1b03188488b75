import assert from "node:assert/strict";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { test, type TestContext } from "node:test";
import { stringify } from "smol-toml";
import { openStream } from "../api/support.ts";
import { cleanup, runMain, temporaryFolder, until } from "../helpers.ts";
import { freePort } from "../wake/world.ts";
import type { Lease, Metrics } from "./world.ts";

interface Shown {
  id: string;
  state: string;
  timed_out: boolean;
  lifecycle_state: string;
  lifecycle_metrics: Metrics;
}

/** The real host as a process, which a test can kill and start again. */
async function begin(t: TestContext) {
  const folder = temporaryFolder(t);
  const [port, config] = [await freePort(), join(folder, "config.toml")];
  const plugins = {
    store: {},
    hypervisor: {},
    process: { grace: "1s", cgroup_parent: "" },
    journal: {},
    lazy: {},
    api: { listen: `127.0.0.1:${port}` },
  };
  writeFileSync(config, stringify({ data_dir: "data", host: { log_level: "warning" }, plugins }));
  const url = `http://127.0.0.1:${port}`;
  const call = async <T>(method: string, path: string, body?: unknown): Promise<T> => {
    const response = await fetch(url + path, {
      method,
      headers: { "Content-Type": "application/json", Connection: "close" },
      ...(body !== undefined && { body: JSON.stringify(body) }),
    });
    const text = await response.text();
    assert.ok(response.ok, `${method} ${path}: ${response.status} ${text}`);
    return (text && JSON.parse(text)) as T;
  };
  let child: ReturnType<typeof runMain> | undefined;
  const start = async () => {
    const started = child = runMain(t, ["--config", config]);
    // Instances outlive a host, so they are deleted by one.
    cleanup(t).defer(async () => {
      if (child !== started) return;
      for (const { id } of await call<Shown[]>("GET", "/instances")) await call("DELETE", `/instances/${id}`);
      started.kill("SIGTERM");
      await started;
    });
    await until("the host answers", () => fetch(`${url}/health`).then((r) => r.ok, () => false), 30_000);
  };
  const kill = async () => {
    child!.kill("SIGKILL");
    await child;
    child = undefined;
  };
  await start();
  const reaches = async (state: string) => {
    const wait = await call<Shown>("GET", `/instances/worker/wait?state=${state}&timeout=30s`);
    assert.deepEqual([wait.state, wait.timed_out], [state, false]);
  };
  return { url, call, start, kill, reaches, shown: () => call<Shown>("GET", "/instances/worker") };
}

const WORKER = {
  name: "worker",
  image: "host",
  cmd: ["sh", "-c", "exec sleep 1000"],
};

// W22: what this is for.
for (const [via, asleep] of [["stop", "Stopped"], ["standby", "Standby"]] as const) {
  test(`a real process runs while somebody has leased it and is put away by ${via} after that`, async (t) => {
    const { url, call, reaches, shown } = await begin(t);
    await call("POST", "/instances", { ...WORKER, lazy: { enabled: true, idle_stop: "500ms", via } });
    await reaches(asleep);
    const { event } = await openStream(t, `${url}/events?instance=worker`);
    const next = async (type: string) => {
      for (;;) {
        const message = (await event())!;
        if (message.event === type) return JSON.parse(message.data!);
      }
    };

    const all = await Promise.all(
      [1, 2, 3].map(() => call<Lease>("POST", "/instances/worker/acquire", { ttl: "30s" })),
    );
    // Who comes when it runs already has not started it; there is one start all the same.
    assert.ok(all.some(({ started }) => started));
    assert.deepEqual([(await shown()).state, (await shown()).lifecycle_state], ["Running", "running"]);
    const started = await next("container.lazy_started");
    assert.deepEqual(started.detail, { instance: all[0].instance, latency_ms: started.detail.latency_ms });

    // Longer than the idle window, with one lease of three.
    for (const { lease } of all.slice(1)) await call("DELETE", `/instances/worker/leases/${lease}`);
    const wait = await call<Shown>("GET", `/instances/worker/wait?state=${asleep}&timeout=1500ms`);
    assert.deepEqual([wait.state, wait.timed_out], ["Running", true]);
    await call("DELETE", `/instances/worker/leases/${all[0].lease}`);
    const stopped = await next("container.lazy_stopped");
    assert.ok(stopped.detail.idle_seconds >= 0.5);
    assert.equal((await shown()).state, asleep);
    const { starts, stops, leases_granted, last_event } = (await shown()).lifecycle_metrics;
    assert.deepEqual([starts, stops, leases_granted, last_event?.type], [1, 2, 3, "lazy_stop"]);
    const agents = await call<{ name: string; type: string }[]>("GET", "/agents");
    assert.deepEqual(agents.map(({ name, type }) => [name, type]), [["worker", "process"]]);
  });
}

// S10: with a host that is killed, not closed.
test("a lease and the counts outlive kill -9 of the host, and the idle window goes on behind it", async (t) => {
  const { call, start, kill, reaches, shown } = await begin(t);
  await call("POST", "/instances", { ...WORKER, lazy: { enabled: true, idle_stop: "500ms" } });
  await reaches("Stopped");
  for (let n = 0; n < 3; n++) {
    const { lease } = await call<Lease>("POST", "/instances/worker/acquire");
    await call("DELETE", `/instances/worker/leases/${lease}`);
    await until("it is stopped", async () => (await shown()).lifecycle_metrics.stops === n + 2);
  }
  const { lease } = await call<Lease>("POST", "/instances/worker/acquire", { ttl: "10m" });
  const before = await shown();
  assert.deepEqual([before.lifecycle_metrics.starts, before.lifecycle_metrics.leases_granted], [4, 4]);
  await kill();
  await start();
  const after = await shown();
  assert.deepEqual(after.lifecycle_metrics, before.lifecycle_metrics);
  assert.deepEqual([after.state, after.lifecycle_state], ["Running", "running"]);
  await call("POST", `/instances/worker/leases/${lease}/renew`, { ttl: "1s" });
  await reaches("Stopped");
  await until("it is counted", async () => (await shown()).lifecycle_metrics.stops === 5);
});
