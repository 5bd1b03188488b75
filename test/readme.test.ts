import assert from "node:assert/strict";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { test, type TestContext } from "node:test";
import { execa } from "execa";
import { freePort, lacking, ROOT, runMain, temporaryFolder, until } from "./helpers.ts";
import { block, current, README } from "./readme.ts";

/** The real `main.ts` with the default config, on a port, data_dir and network of its own. */
async function hostFor(t: TestContext, args: string[] = []) {
  const port = await freePort();
  const data = temporaryFolder(t);
  const env = {
    DORMOUSE_DATA_DIR: data,
    DORMOUSE_PLUGINS__API__LISTEN: `127.0.0.1:${port}`,
    DORMOUSE_PLUGINS__NETWORK__BRIDGE: "dmreadme0",
    DORMOUSE_PLUGINS__NETWORK__SUBNET: "10.120.0.0/16",
  };
  const child = runMain(t, args, env);
  const address = `127.0.0.1:${port}`;
  await until("the host answers", () => fetch(`http://${address}/health`).then((r) => r.ok, () => false), 180_000);
  const purge = async () => {
    child.kill("SIGTERM");
    await child;
    await runMain(t, [...args, "--purge-wake"], env);
    await runMain(t, [...args, "--purge-network"], env);
  };
  return { address, data, purge };
}

test("what README.md shows of the code is current (deno task docs)", () => {
  const text = readFileSync(README, "utf8");
  assert.equal(text, current(text));
});

test("the session of README.md works as printed", async (t) => {
  const { address, purge } = await hostFor(t);
  const script = block("session").replaceAll("127.0.0.1:8080", address);
  const { stdout } = await execa("bash", ["-euo", "pipefail", "-c", script], { timeout: 300_000 });
  for (const line of ["awake: 200", "awake again: 200"]) {
    assert.ok(stdout.includes(line), `${line}\n${stdout}`);
  }
  assert.match(stdout, /"state":"Standby"/);
  assert.match(stdout, /GET \/ HTTP/, "logs");
  assert.match(stdout, /"cpu_seconds":/, "stats");
  assert.match(stdout, /"stdout":"Linux\\n"/, "exec");
  assert.deepEqual(await (await fetch(`http://${address}/instances`)).json(), []);
  await purge();
});

const root = process.getuid?.() === 0 ? null : "needs root for conntrack and nftables";

// W22: what the README says of waking is what its own commands do.
test("an instance sleeps by itself and wakes on traffic, as README.md shows", { skip: lacking(root) }, async (t) => {
  const { address, purge } = await hostFor(t);
  const script = block("sleep").replaceAll("127.0.0.1:8080", address).replaceAll("9000", String(await freePort()));
  const { stdout } = await execa("bash", ["-euo", "pipefail", "-c", script], { timeout: 90_000 });
  assert.match(stdout, /"state":"Standby","state_error":null,"timed_out":false/, stdout);
  assert.match(stdout, /woken: 200/, stdout);
  assert.match(stdout, /awake: 200/, stdout);
  assert.match(stdout, /"status":"(active|idle_countdown)"/, stdout);
  assert.match(stdout, /"hold_until":"2/, stdout);
  await purge();
});

test("what README.md shows of health, restarts, the journal, leases and metrics works as printed", async (t) => {
  const { address, purge } = await hostFor(t);
  const expected = {
    health: [
      /"status":"healthy"/,
      /"status":"unhealthy"/,
      /"last_error":".*404/,
      /^event: health:changed$/m,
      /"disabled"/,
    ],
    restart: [/"restart_status":\{"attempts":3,.*"blocked_reason":"max_attempts_exceeded"/],
    journal: [
      /"events":\[\{"seq":1,.*\{"seq":2,.*"next":2/,
      /^event: standby$/m,
      /"action":"standby".*"action":"delete"/,
    ],
    lazy: [/"state":"Stopped"/, /"expires_at":"2/, /"name":"worker".*"lifecycle_state":"running"/],
    metrics: [
      /^process_resident_memory_bytes \d/m,
      /^dormouse_action_duration_seconds_count\{action="create",driver="process",result="ok"\} 4$/m,
    ],
  };
  // The journal's block names the first event of a host, so it comes first.
  for (const name of ["journal", "health", "restart", "lazy", "metrics"] as const) {
    const script = block(name).replaceAll("127.0.0.1:8080", address);
    const { stdout } = await execa("bash", ["-euo", "pipefail", "-c", script], { timeout: 300_000 });
    for (const pattern of expected[name]) assert.match(stdout, pattern, `${name}\n${stdout}`);
  }
  assert.deepEqual(await (await fetch(`http://${address}/instances`)).json(), []);
  await purge();
});

test("the plugin of README.md works as printed", async (t) => {
  const folder = temporaryFolder(t);
  writeFileSync(join(folder, "work-in-progress.ts"), block("plugin"));
  const config = readFileSync(join(ROOT, "config", "config.toml"), "utf8");
  writeFileSync(join(folder, "config.toml"), `${config}\n[plugins.work-in-progress]\nuse = "./work-in-progress.ts"\n`);
  const { address, data, purge } = await hostFor(t, ["--config", join(folder, "config.toml")]);
  const call = async (method: string, path: string, body?: unknown) => {
    const headers = { "content-type": "application/json" };
    const response = await fetch(`http://${address}/instances${path}`, {
      method,
      headers,
      ...(body !== undefined && { body: JSON.stringify(body) }),
    });
    return { status: response.status, body: response.status === 204 ? null : await response.json() };
  };
  assert.equal((await call("POST", "", { name: "hello", image: "host", cmd: ["sleep", "1000"] })).status, 201);
  await execa("mkdir", ["-p", join(data, "busy")]);
  writeFileSync(join(data, "busy", "hello"), "");
  const refused = await call("POST", "/hello/standby");
  assert.equal(refused.status, 409);
  assert.deepEqual([refused.body.code, refused.body.details.reason], ["vetoed", "its busy file is there"]);
  await execa("rm", [join(data, "busy", "hello")]);
  assert.equal((await call("POST", "/hello/standby")).body.state, "Standby");
  assert.equal((await call("DELETE", "/hello")).status, 204);
  await purge();
});
