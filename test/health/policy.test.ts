import assert from "node:assert/strict";
import { describe, it } from "node:test";
import * as v from "valibot";
import type { Instance } from "../../main.ts";
import { HealthCheck, type Means, normalise } from "../../plugins/health/policy.ts";
import { ORIGIN } from "../hypervisor/scripted.ts";
import { world } from "./world.ts";

const MEANS: Means = { reaches: ({ network }) => network.enabled, executes: () => true };
const INSTANCE = { driver: "any", network: { enabled: true } } as Instance;
const kept = (body: unknown, means = MEANS, instance = INSTANCE) =>
  normalise(v.parse(HealthCheck, body), instance, means);

const TIMING = { interval: "10s", timeout: "2s", start_period: "30s", failure_threshold: 3, success_threshold: 1 };
const HTTP = { port: 80, path: "/", scheme: "http", expected_status: 200, tls_verify: true };

describe("normalise()", () => {
  it("fills in the defaults of the contract and infers the type", () => {
    assert.deepEqual(kept({ http: { port: 80 } }), { type: "http", ...TIMING, http: HTTP });
    assert.deepEqual(kept({ tcp: { port: 5432 } }), { type: "tcp", ...TIMING, tcp: { port: 5432 } });
    const exec = { command: ["pg_isready", "-q"], working_dir: "/tmp" };
    assert.deepEqual(kept({ exec }), { type: "exec", ...TIMING, exec });
    assert.deepEqual(kept({ type: "tcp", tcp: { port: 1 }, failure_threshold: 0, success_threshold: 0 }), {
      type: "tcp",
      ...TIMING,
      tcp: { port: 1 },
    });
    const often = { interval: "1s", timeout: "1s" };
    assert.deepEqual(kept({ tcp: { port: 1 }, interval: "1s" }), {
      type: "tcp",
      ...TIMING,
      ...often,
      tcp: { port: 1 },
    });
  });

  it("keeps what is asked for, with durations in Go's spelling", () => {
    const http = { port: 8443, path: "/up?deep=1", scheme: "https", expected_status: 204, tls_verify: false };
    const timing = {
      interval: "60s",
      timeout: "1500ms",
      start_period: "0",
      failure_threshold: 1,
      success_threshold: 2,
    };
    assert.deepEqual(kept({ type: "http", ...timing, http: { ...http, expected_body: "ready" } }), {
      type: "http",
      ...timing,
      interval: "1m0s",
      timeout: "1.5s",
      start_period: "0s",
      http: { ...http, expected_body: "ready" },
    });
  });

  it("keeps nothing but the type of a check that is off", () => {
    assert.deepEqual(kept({}), { type: "none" });
    assert.deepEqual(kept({ type: "none", http: { port: 80 }, tcp: { port: 80 } }), { type: "none" });
  });

  it("refuses what cannot work for the instance", () => {
    const alone = { ...INSTANCE, network: { enabled: false } } as Instance;
    for (const body of [{ http: { port: 80 } }, { tcp: { port: 80 } }]) {
      assert.throws(() => kept(body, MEANS, alone), { code: "invalid_health_check" });
      assert.ok(kept(body, { ...MEANS, reaches: () => true }, alone), "on the machine's own network it is reached");
    }
    assert.throws(() => kept({ exec: { command: ["x"] } }, { ...MEANS, executes: () => false }), /cannot execute/);
    assert.ok(kept({ exec: { command: ["x"] } }, MEANS, alone));
    assert.ok(kept({ exec: { command: ["x"] } }, { ...MEANS, executes: () => undefined }), "others refuse the driver");
  });
});

describe("the field health_check", () => {
  const wrong: [string, unknown, string][] = [
    ["no block of its type", { type: "http" }, "health_check.http"],
    ["the block of another type", { type: "tcp", tcp: { port: 1 }, http: { port: 1 } }, "health_check.http"],
    ["two blocks and no type", { tcp: { port: 1 }, http: { port: 1 } }, "health_check.type"],
    ["a type that there is not", { type: "grpc" }, "health_check.type"],
    ["an interval of zero", { tcp: { port: 1 }, interval: "0s" }, "health_check.interval"],
    ["an interval that is none", { tcp: { port: 1 }, interval: "soon" }, "health_check.interval"],
    ["a timeout of zero", { tcp: { port: 1 }, timeout: "0s" }, "health_check.timeout"],
    ["a timeout above the interval", { tcp: { port: 1 }, interval: "1s", timeout: "1001ms" }, "health_check.timeout"],
    ["a start period below zero", { tcp: { port: 1 }, start_period: "-1s" }, "health_check.start_period"],
    ["a threshold below zero", { tcp: { port: 1 }, failure_threshold: -1 }, "health_check.failure_threshold"],
    ["a threshold that is no number", { tcp: { port: 1 }, success_threshold: 1.5 }, "health_check.success_threshold"],
    ["no port", { tcp: {} }, "health_check.tcp.port"],
    ["port 0", { tcp: { port: 0 } }, "health_check.tcp.port"],
    ["port 65536", { http: { port: 65_536 } }, "health_check.http.port"],
    ["a path without a slash", { http: { port: 80, path: "up" } }, "health_check.http.path"],
    ["a path with a line break", { http: { port: 80, path: "/\r\nX: y" } }, "health_check.http.path"],
    ["a path with a space", { http: { port: 80, path: "/a b" } }, "health_check.http.path"],
    ["another scheme", { http: { port: 80, scheme: "ftp" } }, "health_check.http.scheme"],
    ["status 99", { http: { port: 80, expected_status: 99 } }, "health_check.http.expected_status"],
    ["status 600", { http: { port: 80, expected_status: 600 } }, "health_check.http.expected_status"],
    ["an empty body", { http: { port: 80, expected_body: "" } }, "health_check.http.expected_body"],
    ["no command", { exec: { command: [] } }, "health_check.exec.command"],
    ["an empty command", { exec: { command: [""] } }, "health_check.exec.command"],
    ["an unknown key", { http: { port: 80, header: "x" } }, "health_check.http.header"],
  ];
  it("is refused with its own code and place when wrong", async (t) => {
    const { hypervisor } = await world(t);
    for (const [what, health_check, field] of wrong) {
      await assert.rejects(hypervisor.create({ name: "web", image: "any", health_check }, ORIGIN), {
        code: "invalid_health_check",
        details: { field },
      }, what);
    }
    assert.deepEqual(hypervisor.list(), []);
  });

  it("is refused for a driver that cannot execute", async (t) => {
    const { hypervisor, driver, make } = await world(t);
    (driver.features as Set<string>).delete("exec");
    await assert.rejects(make(), { code: "invalid_health_check" });
    const health_check = { exec: { command: ["x"] } };
    await assert.rejects(hypervisor.create({ name: "web", image: "any", hypervisor: "none", health_check }, ORIGIN), {
      code: "unknown_driver",
    });
  });

  it("is shown with its status, cleared by null, and disabled by none", async (t) => {
    const { hypervisor, make, status } = await world(t);
    const { id } = await make();
    const shown = () => hypervisor.present(hypervisor.find(id)!);
    assert.deepEqual(shown().health_check, {
      type: "exec",
      ...TIMING,
      start_period: "0s",
      exec: { command: ["check"] },
    });
    const schema = hypervisor.schemas().instance;
    assert.ok(v.safeParse(schema, shown()).success);
    await hypervisor.update(id, { health_check: { type: "none" } }, ORIGIN);
    assert.deepEqual([shown().health_check, status(id).status], [{ type: "none" }, "disabled"]);
    await hypervisor.update(id, { health_check: null }, ORIGIN);
    assert.deepEqual([shown().health_check, status(id).status], [undefined, "disabled"]);
    assert.ok(v.safeParse(schema, shown()).success);
  });
});
