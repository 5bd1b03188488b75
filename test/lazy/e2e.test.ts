import assert from "node:assert/strict";
import { test, type TestContext } from "node:test";
import { openStream } from "../api/support.ts";
import { freePort, until } from "../helpers.ts";
import { Host } from "../host.ts";
import type { Lease, Metrics } from "./world.ts";

interface Shown {
  state: string;
  timed_out: boolean;
  lifecycle_state: string;
  lifecycle_metrics: Metrics;
}

/** A host of one worker. */
class Lazy extends Host {
  static async begin(t: TestContext): Promise<Lazy> {
    const host = new Lazy(t, await freePort(), {
      store: {},
      hypervisor: {},
      process: { grace: "1s", cgroup_parent: "" },
      journal: {},
      lazy: {},
    });
    await host.start();
    return host;
  }

  async reaches(state: string): Promise<void> {
    const wait = await this.call<Shown>("GET", `/worker/wait?state=${state}&timeout=30s`);
    assert.deepEqual([wait.state, wait.timed_out], [state, false]);
  }

  shown(): Promise<Shown> {
    return this.call("GET", "/worker");
  }
}

const WORKER = {
  name: "worker",
  image: "host",
  cmd: ["sh", "-c", "exec sleep 1000"],
};

// W22: what this is for.
for (const [via, asleep] of [["stop", "Stopped"], ["standby", "Standby"]] as const) {
  test(`a real process runs while somebody has leased it and is put away by ${via} after that`, async (t) => {
    const host = await Lazy.begin(t);
    await host.call("POST", "", { ...WORKER, lazy: { enabled: true, idle_stop: "500ms", via } });
    await host.reaches(asleep);
    const { event } = await openStream(t, `${host.url}/events?instance=worker`);
    const next = async (type: string) => {
      for (;;) {
        const message = (await event())!;
        if (message.event === type) return JSON.parse(message.data!);
      }
    };

    const all = await Promise.all(
      [1, 2, 3].map(() => host.call<Lease>("POST", "/worker/acquire", { ttl: "30s" })),
    );
    // Who comes when it runs already has not started it; there is one start all the same.
    assert.ok(all.some(({ started }) => started));
    assert.deepEqual([(await host.shown()).state, (await host.shown()).lifecycle_state], ["Running", "running"]);
    const started = await next("container.lazy_started");
    assert.deepEqual(started.detail, { instance: all[0].instance, latency_ms: started.detail.latency_ms });

    // Longer than the idle window, with one lease of three.
    for (const { lease } of all.slice(1)) await host.call("DELETE", `/worker/leases/${lease}`);
    const wait = await host.call<Shown>("GET", `/worker/wait?state=${asleep}&timeout=1500ms`);
    assert.deepEqual([wait.state, wait.timed_out], ["Running", true]);
    await host.call("DELETE", `/worker/leases/${all[0].lease}`);
    const stopped = await next("container.lazy_stopped");
    assert.ok(stopped.detail.idle_seconds >= 0.5);
    assert.equal((await host.shown()).state, asleep);
    const { starts, stops, leases_granted, last_event } = (await host.shown()).lifecycle_metrics;
    assert.deepEqual([starts, stops, leases_granted, last_event?.type], [1, 2, 3, "lazy_stop"]);
    const { text } = await host.ask("GET", "/agents");
    const agents: { name: string; type: string }[] = JSON.parse(text);
    assert.deepEqual(agents.map(({ name, type }) => [name, type]), [["worker", "process"]]);
  });
}

// S10: with a host that is killed, not closed.
test("a lease and the counts outlive kill -9 of the host, and the idle window goes on behind it", async (t) => {
  const host = await Lazy.begin(t);
  await host.call("POST", "", { ...WORKER, lazy: { enabled: true, idle_stop: "500ms" } });
  await host.reaches("Stopped");
  for (let n = 0; n < 3; n++) {
    const { lease } = await host.call<Lease>("POST", "/worker/acquire");
    await host.call("DELETE", `/worker/leases/${lease}`);
    await until("it is stopped", async () => (await host.shown()).lifecycle_metrics.stops === n + 2);
  }
  const { lease } = await host.call<Lease>("POST", "/worker/acquire", { ttl: "10m" });
  const before = await host.shown();
  assert.deepEqual([before.lifecycle_metrics.starts, before.lifecycle_metrics.leases_granted], [4, 4]);
  await host.kill();
  await host.start();
  const after = await host.shown();
  assert.deepEqual(after.lifecycle_metrics, before.lifecycle_metrics);
  assert.deepEqual([after.state, after.lifecycle_state], ["Running", "running"]);
  await host.call("POST", `/worker/leases/${lease}/renew`, { ttl: "1s" });
  await host.reaches("Stopped");
  await until("it is counted", async () => (await host.shown()).lifecycle_metrics.stops === 5);
});
