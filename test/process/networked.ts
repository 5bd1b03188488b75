// Run by network.test.ts in a network of its own.
import assert from "node:assert/strict";
import { test } from "node:test";
import { run } from "../../plugins/shared/run.ts";
import { GATEWAY, reach, worldOf } from "../network/world.ts";
import { instanceOf, ProcessFixture } from "./fixture.ts";

const NEVER = new AbortController().signal;

test("start() puts it into its namespace, where exec() and stats() look too, and delete() removes that", async (t) => {
  const { network, instance: addressed } = await worldOf(t);
  const fixture = new ProcessFixture(t, { network });
  const driver = fixture.open();
  const instance = instanceOf(["sleep", "600"], { run_as: "nobody" });
  const wired = { ...instance, network: addressed(instance.id).network };
  await driver.create(wired);
  await driver.start(wired, NEVER);
  const exec = (...command: string[]) => driver.exec(wired, { command, timeout_ms: 10_000, max_output: 10_000 });
  assert.match((await exec("ip", "-4", "-o", "addr", "show", "eth0")).stdout, new RegExp(` ${wired.network.ip}/`));
  const before = await driver.stats(wired);
  await reach(wired.network.ip!);
  assert.match(await run("ping", ["-c", "3", "-W", "2", wired.network.ip!]), / 0% packet loss/);
  const after = await driver.stats(wired);
  assert(after.network_rx_bytes - before.network_rx_bytes >= 3 * 84);
  assert(after.network_tx_bytes - before.network_tx_bytes >= 3 * 84);
  assert.match(await run("ip", ["netns"]), new RegExp(wired.id));
  // A host after this one finds it in the same place.
  const next = fixture.open();
  assert.equal((await next.adopt(wired)).state, "Running");
  await next.standby(wired, NEVER);
  await next.stop(wired, NEVER);
  await next.start(wired, NEVER);
  assert.match(await reach(wired.network.ip!), / 0% packet loss/);
  await next.delete(wired);
  assert.doesNotMatch(await run("ip", ["netns"]), new RegExp(wired.id));
  assert.deepEqual(fixture.remains(wired), []);
});

test("start() gives one that asked for no network nothing but its own loopback", async (t) => {
  const { network } = await worldOf(t);
  const driver = new ProcessFixture(t, { network }).open();
  const instance = instanceOf(["sleep", "600"], { network: { enabled: false, ip: null, mac: null, ip6: null } });
  await driver.create(instance);
  await driver.start(instance, NEVER);
  const exec = async (...command: string[]) =>
    (await driver.exec(instance, { command, timeout_ms: 10_000, max_output: 10_000 })).stdout;
  const links = (await exec("ip", "-o", "link")).trim().split("\n");
  assert.equal(links.length, 1);
  assert.match(links[0], /: lo: <LOOPBACK,UP/);
  assert.equal(
    await exec("sh", "-c", `ping -c 1 -W 1 ${GATEWAY} >/dev/null 2>&1 || echo unreachable`),
    "unreachable\n",
  );
  await driver.delete(instance);
});
