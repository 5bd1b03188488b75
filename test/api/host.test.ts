import assert from "node:assert/strict";
import { test } from "node:test";
import { apiHost } from "./support.ts";

test("GET /health tells of every plugin", async (t) => {
  const { call } = await apiHost(t);
  const reply = await call("GET", "/health");
  const plugins = { store: true, hypervisor: true, talking: true, api: true };
  assert.deepEqual([reply.status, reply.body as unknown], [200, { status: "ok", plugins }]);
});

test("GET /capabilities tells of drivers and what they can", async (t) => {
  const { call } = await apiHost(t);
  const { status, body } = await call("GET", "/capabilities");
  assert.equal(status, 200);
  assert.deepEqual(body.runtimes, [{
    name: "scripted",
    available: true,
    features: ["exec", "fork", "host-network", "logs", "pause", "snapshots", "standby", "stat", "stats"],
  }]);
  assert.deepEqual(body.default_runtime, { name: "scripted", available: true });
  assert.deepEqual(body.network, { model: "bridge", guest_to_guest: true });
});

test("GET /resources counts what instances that are awake were given", async (t) => {
  const { call } = await apiHost(t);
  await call("POST", "/instances", { name: "web", image: "any", vcpus: 1, size: "1MB" });
  await call("POST", "/instances", { name: "asleep", image: "any", vcpus: 1, size: "1MB" });
  await call("POST", "/instances/asleep/standby");
  const { body } = await call("GET", "/resources");
  for (const type of ["cpu", "memory", "disk", "network"]) {
    const { capacity, effective_limit, allocated, available, oversub_ratio, ...rest } = body[type] as Record<
      string,
      number
    >;
    assert.deepEqual([effective_limit, oversub_ratio, rest], [capacity, 1, { type, source: "detected" }]);
    assert.equal(available, Math.max(0, capacity - allocated), type);
    if (type !== "network") assert.ok(capacity > 0, type);
  }
  assert.deepEqual(
    [(body.cpu as Record<string, number>).allocated, (body.memory as Record<string, number>).allocated],
    [
      1,
      1_048_576,
    ],
  );
  const [allocation, ...others] = body.allocations as Record<string, unknown>[];
  assert.deepEqual([allocation.instance_name, allocation.cpu, allocation.memory_bytes], ["web", 1, 1_048_576]);
  assert.deepEqual(others, []);
});
