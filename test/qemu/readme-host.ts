// Run by readme.test.ts in a network of its own, where the addresses and ports that README.md names are free.
import assert from "node:assert/strict";
import { connect } from "node:net";
import { join } from "node:path";
import process from "node:process";
import { test, type TestContext } from "node:test";
import { execa } from "execa";
import { cleanup, ROOT, runMain, temporaryFolder, until } from "../helpers.ts";
import { Client } from "../host.ts";
import { block } from "../readme.ts";
import type { Report } from "./guest.ts";

const api = new Client("http://127.0.0.1:8080");
const CONFIG = join(ROOT, "config", "vm-host.toml");

interface Shown {
  id: string;
  name: string;
  state: string;
  network: { ip: string; ip6: string | null; mac: string };
  wake: { ports: unknown[] };
}

/** The real `main.ts` with the config that README.md names, on a data_dir of its own. */
async function host(t: TestContext): Promise<Record<string, string>> {
  const env = { DORMOUSE_DATA_DIR: temporaryFolder(t) };
  const child = runMain(t, ["--config", CONFIG], env);
  await until("the host answers", () => api.answers(), 180_000);
  cleanup(t).defer(async () => {
    // Machines outlive a host.
    for (const { id } of await api.call<Shown[]>("GET", "")) await api.call("DELETE", `/${id}`);
    child.kill("SIGTERM");
    // Shown where a test fails.
    console.log((await child).stderr);
  });
  return env;
}

/** A connection that is noticed only now is in the way of a standby. */
async function asleep(): Promise<Shown> {
  await until("it sleeps", async () => (await api.ask("POST", "/instances/guest/standby")).status === 200);
  return await api.call<Shown>("GET", "/guest");
}

async function report(address: string): Promise<Report> {
  return await (await fetch(`http://${address}/`, { headers: { connection: "close" } })).json();
}

async function paste(name: string): Promise<string> {
  const { stdout } = await execa("bash", ["-euo", "pipefail", "-c", block(name)], { timeout: 540_000 });
  return stdout;
}

test("README.md's sessions with machines", async (t) => {
  const env = await host(t);
  const missing = await api.ask("POST", "/instances", { name: "guest", image: "demo" });
  assert.deepEqual([missing.status, JSON.parse(missing.text).code], [404, "image_not_found"]);
  assert.match(missing.text, /deno task image:demo/);
  const added = await api.ask("POST", "/images", { name: "demo", path: process.env.DORMOUSE_TEST_IMAGE });
  assert.equal(added.status, 201, added.text);
  // As `deno task image:demo` does it, beside a host that runs; it would build where the host has found the image.
  const build = await runMain(t, ["--config", CONFIG, "--image-demo"], env);
  assert.match(build.stderr, /Cannot build image ".*\/images\/demo": it is there already/);

  const shown = await paste("vm");
  assert.match(shown, /"state":"Initializing"/, shown);
  assert.match(shown, /"state":"Running","state_error":null,"timed_out":false/, shown);
  assert.match(shown, /"hostname":"guest","requests":1,/, shown);
  assert.match(shown, /"stdout":"guest\\n"/, shown);
  assert.match(shown, /"state":"Standby","state_error":null,"timed_out":false/, shown);
  assert.match(shown, /"hostname":"guest","requests":2,[^]*woken in/, shown);

  await connectedBefore();
  await restoredTogether();
  await forkedTogether();

  const forked = await paste("fork");
  console.log(`seen: ${shown.match(/woken in .*/)}`);
  assert.match(forked, /"hostname":"twin","requests":4,/, "2 of README.md's, one between them, and its own");
  assert.match(forked, /^"state":"Standby"$/m, forked);
  const left = await api.call<Shown[]>("GET", "");
  assert.deepEqual(left.map(({ name }) => name), []);
});

// R10: whoever was connected when it fell asleep is connected still.
async function connectedBefore(): Promise<void> {
  const { network } = await api.call<Shown>("GET", "/guest");
  const socket = connect(7, network.ip);
  try {
    let echo = "";
    socket.setEncoding("utf8").on("data", (text) => echo += text);
    socket.write("before ");
    await until("it comes back", () => echo === "before ");
    const status = () => api.call<{ status: string }>("GET", "/guest/auto-standby/status");
    await until("the connection was seen", async () => (await status()).status === "active");
    await asleep();
    socket.write("meanwhile");
    await api.call("POST", "/guest/restore");
    await until("that comes back too", () => echo === "before meanwhile");
  } finally {
    socket.destroy();
  }
}

// R13: many who wake one machine are answered by one restore, and nobody is refused for a state that was.
async function restoredTogether(): Promise<void> {
  const { id } = await asleep();
  const restores = async () => {
    const { text } = await api.ask("GET", `/instances/${id}/events?type=restore`);
    return JSON.parse(text).events.length as number;
  };
  const before = await restores();
  const woken = Array.from({ length: 4 }, async () => {
    assert.equal((await api.call<Shown>("POST", "/guest/restore")).state, "Running");
    assert.equal((await api.call<Shown>("GET", "/guest")).state, "Running");
  });
  const [answer] = await Promise.all([report("127.0.0.1:9000"), ...woken]);
  assert.equal(answer.requests, 3);
  assert.equal(await restores(), before + 1);
}

// F1, F2, F4: copies that are made at the same time have nothing in common that tells one machine from another.
async function forkedTogether(): Promise<void> {
  // Whose end the source still has to take note of would wake it again.
  const connected = async () =>
    (await api.call<{ active_inbound_connections: number }>("GET", "/guest/auto-standby/status"))
      .active_inbound_connections;
  await until("nobody is connected any more", async () => await connected() === 0);
  const source = await asleep();
  const names = ["one", "two", "three"];
  const forks = await Promise.all(
    names.map((name) => api.call<Shown>("POST", "/guest/fork", { name, target_state: "Running" })),
  );
  assert.deepEqual(forks.map(({ state }) => state), ["Running", "Running", "Running"]);
  const reports = await Promise.all(forks.map(({ network }) => report(network.ip)));
  assert.deepEqual(reports.map(({ hostname }) => hostname), names);
  assert.deepEqual(reports.map(({ requests }) => requests), [4, 4, 4]);
  await api.call("POST", "/one/stop");
  const stopped = await api.call<Shown>("POST", "/one/fork", { name: "four" });
  assert.equal(stopped.state, "Stopped");
  const all = [source, ...forks, stopped];
  for (const tell of ["ip", "ip6", "mac"] as const) {
    const told = all.map(({ network }) => network[tell]).filter((each) => each !== null);
    assert.equal(new Set(told).size, told.length, told.join());
  }
  assert.deepEqual(all.map(({ wake }) => wake.ports.length), [1, 0, 0, 0, 0]);
  assert.equal((await api.call<Shown>("GET", "/guest")).state, "Standby");
  for (const { name } of [...forks, stopped]) await api.call("DELETE", `/${name}`);
}
