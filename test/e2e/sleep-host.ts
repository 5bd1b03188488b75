// Run by sleep.test.ts in a network of its own: the real main.ts, the real kernel.
import assert from "node:assert/strict";
import { once } from "node:events";
import { existsSync } from "node:fs";
import { connect } from "node:net";
import { join } from "node:path";
import { test, type TestContext } from "node:test";
import { delay } from "../../plugins/shared/async.ts";
import { run } from "../../plugins/shared/run.ts";
import { cleanup, freePort, RUNTIME, until } from "../helpers.ts";
import { Host } from "../host.ts";
import { open, rest, talk } from "../wake/world.ts";

const BRIDGE = "dmsleep0";
const GUEST = 8080;
const ECHO = join(import.meta.dirname!, "sleep-echo.ts");
const IPV6 = existsSync("/proc/net/if_inet6");

interface Shown {
  state: string;
  timed_out: boolean;
  network: { ip: string; ip6: string };
}
interface Status {
  status: string;
  reason: string;
  active_inbound_connections: number;
}

/** A host whose instances sleep when nobody is connected. */
class Sleepers extends Host {
  static async begin(t: TestContext): Promise<Sleepers> {
    const host = new Sleepers(t, await freePort(), {
      store: {},
      network: { bridge: BRIDGE, subnet: "10.125.0.0/16" },
      hypervisor: {},
      process: { grace: "1s" },
      conntrack: {},
      "conntrack-standby": { min_awake: "0s" },
      wake: {},
    });
    await host.start();
    return host;
  }

  /** An instance that echoes, is published, and sleeps after two seconds. */
  async make(name: string): Promise<{ port: number; network: Shown["network"] }> {
    const port = await freePort();
    const { network } = await this.call<Shown>("POST", "", {
      name,
      image: "host",
      cmd: [...RUNTIME, ECHO, String(GUEST)],
      auto_standby: { enabled: true, idle_timeout: "2s" },
      wake: { ports: [{ host_port: port, guest_port: GUEST }] },
    });
    await until("it listens", async () => await talk(GUEST, "hello", network.ip) === "hello");
    return { port, network };
  }

  async sleeps(name: string): Promise<void> {
    const { state, timed_out } = await this.call<Shown>("GET", `/${name}/wait?state=Standby&timeout=30s`);
    assert.deepEqual([state, timed_out], ["Standby", false]);
  }
}

/** An address of the host itself on the bridge, through which the kernel forwards published ports. */
async function gateway6(): Promise<string> {
  const [{ addr_info }] = JSON.parse(await run("ip", ["-6", "-j", "addr", "show", "dev", BRIDGE, "scope", "global"]));
  return addr_info[0].local;
}

// I21, W22: what this is for.
for (const family of IPV6 ? ["IPv4", "IPv6"] : ["IPv4"]) {
  test(`over ${family}, who is connected keeps it awake, and the next connection wakes it`, async (t) => {
    const host = await Sleepers.begin(t);
    const { port, network } = await host.make("web");
    const published = family === "IPv4" ? "127.0.0.1" : await gateway6();
    const own = family === "IPv4" ? network.ip : network.ip6;

    for (const [to, at] of [[published, port], [own, GUEST]] as const) {
      const client = await open(t, at, to);
      client.write("one");
      await once(client, "data");
      const { state, timed_out } = await host.call<Shown>("GET", "/web/wait?state=Standby&timeout=4s");
      assert.deepEqual([state, timed_out], ["Running", true], "silent for longer than its idle timeout");
      const status = await host.call<Status>("GET", "/web/auto-standby/status");
      assert.deepEqual([status.status, status.active_inbound_connections], ["active", 1]);
      client.end("two");
      assert.equal(await rest(client), "two");
      await host.sleeps("web");

      const waker = await open(t, at, to);
      waker.write("wake up");
      assert.equal(String((await once(waker, "data"))[0]), "wake up");
      // While somebody is connected, for it sleeps soon after.
      assert.equal((await host.call<Shown>("GET", "/web")).state, "Running");
      waker.end();
      await rest(waker);
      await host.sleeps("web");
    }
  });
}

// R3: nobody who comes while there is no host is lost.
test("who comes while the host is dead is answered by the next one", async (t) => {
  const host = await Sleepers.begin(t);
  const { port, network } = await host.make("web");
  await host.sleeps("web");
  await host.kill();

  // The sleeping instance's kernel takes these, and keeps what they say.
  const waiting = await Promise.all([open(t, port), open(t, GUEST, network.ip)]);
  for (const client of waiting) client.end("still there?");
  const answers = Promise.all(waiting.map(rest));
  // This one comes by the listener of the host, which refuses while nobody is there.
  let refused = 0;
  const trying = (async () => {
    for (;;) {
      const answer = await talk(port, "anybody?", IPV6 ? "::1" : "127.0.0.1");
      if (answer === "anybody?") return answer;
      refused++;
      await delay(50);
    }
  })();
  if (IPV6) await until("it has been refused", () => refused > 0);
  await host.start();
  assert.deepEqual(await answers, ["still there?", "still there?"]);
  assert.equal(await trying, "anybody?");
  await host.sleeps("web");
});

// The kernel's handshake alone, with nothing said, is somebody too.
test("a silent connection of the time without a host wakes, and keeps it awake", async (t) => {
  const host = await Sleepers.begin(t);
  const { port } = await host.make("web");
  await host.sleeps("web");
  await host.kill();
  const client = connect({ host: "127.0.0.1", port, allowHalfOpen: true });
  cleanup(t).defer(() => void client.destroy());
  await once(client, "connect");
  await host.start();
  const wait = await host.call<Shown>("GET", "/web/wait?state=Running&timeout=30s");
  assert.equal(wait.state, "Running");
  const { timed_out } = await host.call<Shown>("GET", "/web/wait?state=Standby&timeout=4s");
  assert.equal(timed_out, true);
  client.end("bye");
  assert.equal(await rest(client), "bye");
  await host.sleeps("web");
});
