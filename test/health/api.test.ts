import assert from "node:assert/strict";
import { test } from "node:test";
import Hypeman, { APIError } from "@onkernel/hypeman";
import { Validator } from "@seriousme/openapi-schema-validator";
import type { Plugin } from "../../main.ts";
import apiPlugin from "../../plugins/api/mod.ts";
import healthPlugin from "../../plugins/health/mod.ts";
import hypervisorPlugin from "../../plugins/hypervisor/mod.ts";
import processPlugin from "../../plugins/process/mod.ts";
import storePlugin from "../../plugins/store.ts";
import { cleanup, startWith, temporaryFolder, until } from "../helpers.ts";
import { apiHost } from "../api/support.ts";

const TOKEN = "client-test-0123456789";

test("@onkernel/hypeman gives a real process a check and sees its health change", { timeout: 300_000 }, async (t) => {
  const plugins = [storePlugin, hypervisorPlugin, processPlugin, healthPlugin, apiPlugin] as Plugin[];
  const host = await startWith(t, plugins, {
    tables: {
      process: { grace: "1s", cgroup_parent: "" },
      api: { listen: "127.0.0.1:0", access_log: false, tokens: [{ name: "client", token: TOKEN }] },
    },
  });
  const { instances } = new Hypeman({ apiKey: TOKEN, baseURL: host.use("api").url, maxRetries: 0 });
  const health_check = { exec: { command: ["test", "-e", "well"] }, interval: "1s", timeout: "1s" };
  const quick = { ...health_check, start_period: "0s", failure_threshold: 1 };
  const cmd = ["sh", "-c", "touch well; while sleep 0.1; do [ ! -e sick ] || rm -f well; done"];
  const body = { name: "web", image: "host", working_dir: temporaryFolder(t), cmd, health_check: quick };
  const { id, health_check: kept } = await instances.create(body);
  cleanup(t).defer(() => instances.delete(id).catch(() => {}));
  assert.deepEqual(kept, { type: "exec", ...quick, success_threshold: 1 });
  const status = async () => (await instances.get(id)).health_status!;
  await until("it is healthy", async () => (await status()).status === "healthy");
  const driver = host.use("hypervisor").driverOf(host.use("hypervisor").find(id)!, "exec");
  const request = { command: ["touch", "sick"], timeout_ms: 5_000, max_output: 100 };
  await driver.exec(host.use("hypervisor").find(id)!, request);
  // A probe that took too long has made it so as well, for a while.
  await until("it is unhealthy", async () => {
    const { status: now, last_error } = await status();
    return now === "unhealthy" && last_error === "Exit code is 1";
  });
  assert.equal(typeof (await status()).last_success_at, "string");
  assert.equal((await instances.get(id)).state, "Running");

  const refused = instances.create({ name: "db", image: "host", cmd, health_check: { type: "http" } });
  await assert.rejects(refused, (error) => {
    assert.ok(error instanceof APIError);
    assert.deepEqual([error.status, (error.error as { code: string }).code], [400, "invalid_health_check"]);
    return true;
  });
  // Beyond the client's types, as the field's own null is.
  const cleared = await instances.update(
    id,
    { health_check: null } as unknown as Parameters<typeof instances.update>[1],
  );
  assert.deepEqual([cleared.health_check, cleared.health_status?.status], [undefined, "disabled"]);
});

test("the document has the field and the status, and is valid", async (t) => {
  const { call } = await apiHost(t, { plugins: [healthPlugin as Plugin] });
  const { body } = await call("GET", "/openapi.json");
  const result = await new Validator().validate(structuredClone(body) as Record<string, unknown>);
  assert.deepEqual([result.valid, result.errors], [true, undefined]);
  const { schemas } = body.components as { schemas: Record<string, { properties: Record<string, unknown> }> };
  for (const name of ["CreateInstanceRequest", "UpdateInstanceRequest", "Instance"]) {
    assert.ok(schemas[name].properties.health_check, name);
  }
  assert.deepEqual(schemas.Instance.properties.health_status, { $ref: "#/components/schemas/HealthStatus" });
});

test("the field is refused where the plugin is off", async (t) => {
  const { call } = await apiHost(t);
  const { status, body } = await call("POST", "/instances", {
    name: "web",
    image: "any",
    health_check: { tcp: { port: 80 } },
  });
  assert.deepEqual([status, body.code, body.details], [400, "feature_off", {
    field: "health_check",
    plugin: "health",
  }]);
});
