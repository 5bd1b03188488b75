// Run by sleep.test.ts in a network of its own: real sockets and the real kernel, whose events are lost on purpose.
import assert from "node:assert/strict";
import { once } from "node:events";
import { connect, type Socket } from "node:net";
import { join } from "node:path";
import { test } from "node:test";
import type { Plugin } from "../../main.ts";
import standbyPlugin from "../../plugins/conntrack-standby/mod.ts";
import hypervisorPlugin from "../../plugins/hypervisor/mod.ts";
import networkPlugin from "../../plugins/network/mod.ts";
import processPlugin from "../../plugins/process/mod.ts";
import { delay } from "../../plugins/shared/async.ts";
import storePlugin from "../../plugins/store.ts";
import wakePlugin from "../../plugins/wake/mod.ts";
import { cleanup, freePort, RUNTIME, startWith, until } from "../helpers.ts";
import { tablePlugin } from "../wake/table.ts";
import { talk } from "../wake/world.ts";

const EVENTS = 10_000;
const INSTANCES = 16;
const LOST = 0.3;
/** Milliseconds after which a connection without an answer is stranded. */
const STRANDED = 60_000;
const GUEST = 8080;
const ORIGIN = { actor: "test", cause: "request" };
const ECHO = join(import.meta.dirname!, "sleep-echo.ts");
const FINISHED = new Set(["NONE", "TIME_WAIT", "CLOSE"]);

interface Target {
  readonly ip: string;
  readonly ip6: string | null;
  readonly port: number;
}
interface Connection {
  readonly to: Target;
  readonly openedAt: number;
  /** From the moment before the client begins to end it. */
  closing: boolean;
}

const seed = Date.now() % 1_000_000;
let state = seed;
function random(): number {
  state = (state * 1_103_515_245 + 12_345) % 2_147_483_648;
  return state / 2_147_483_648;
}

/** What the clients know of their own connections, by the names that the kernel has for them. */
class Clients {
  readonly connections = new Map<string, Connection>();
  readonly wrong: string[] = [];
  events = 0;
  slowest = 0;

  /** Some connections at once, each ended in one way or the other. */
  async burst(target: Target): Promise<void> {
    await Promise.all(Array.from({ length: 1 + Math.floor(random() * 12) }, () => this.#one(target)));
  }

  async #one(to: Target): Promise<void> {
    const { ip, ip6, port } = to;
    // Published, and by its own addresses.
    const ways = [["127.0.0.1", port], [ip, GUEST], [ip6 ?? ip, GUEST]] as const;
    const [host, at] = ways[Math.floor(random() * ways.length)];
    await delay(random() * 40);
    const began = performance.now();
    const socket = connect({ host, port: at, allowHalfOpen: true });
    const late = setTimeout(() => socket.destroy(new Error(`no answer in ${STRANDED} ms`)), STRANDED);
    try {
      await once(socket, "connect");
      const key = `${socket.localAddress}:${socket.localPort}>${host === ip6 ? ip6 : ip}`;
      const connection = { to, openedAt: Date.now(), closing: false };
      this.connections.set(key, connection);
      this.events++;
      await this.#live(socket, connection, began);
      this.events++;
      this.connections.delete(key);
    } catch (error) {
      this.wrong.push(`a client of ${ip} by ${host}: ${error}`);
    } finally {
      clearTimeout(late);
      socket.destroy();
    }
  }

  async #live(socket: Socket, connection: Connection, began: number): Promise<void> {
    const kind = random();
    if (kind >= 0.15) {
      socket.write("x");
      await once(socket, "data");
      this.slowest = Math.max(this.slowest, performance.now() - began);
      // Now and then silent for longer than the idle timeout.
      await delay(random() * (kind > 0.9 ? 800 : 60));
    }
    connection.closing = true;
    const closed = once(socket, "close");
    if (kind < 0.5) socket.resetAndDestroy();
    else socket.resume().end();
    await closed;
  }
}

// I3, R5: whatever is lost, who is connected keeps it awake, and who connects is answered.
test("no event that is lost puts an instance to sleep that is in use, strands a client or keeps one awake", async (t) => {
  const { plugin, table } = tablePlugin();
  let lost = 0;
  Object.defineProperty(table, "deaf", { get: () => random() < LOST && ++lost > 0 });
  const plugins = [storePlugin, networkPlugin, hypervisorPlugin, processPlugin, plugin, standbyPlugin, wakePlugin];
  const host = await startWith(t, plugins as Plugin[], {
    tables: {
      network: { bridge: "dmsleep1", subnet: "10.125.0.0/16" },
      process: { grace: "100ms" },
      "conntrack-standby": { min_awake: "0s", flap_cycles: 0, retry_backoff: "200ms" },
    },
  });
  const hypervisor = host.use("hypervisor");
  const targets: Target[] = [];
  for (let n = 0; n < INSTANCES; n++) {
    const port = await freePort();
    const { id, network } = await hypervisor.create({
      name: `echo-${n}`,
      image: "host",
      cmd: [...RUNTIME, ECHO, String(GUEST)],
      auto_standby: { enabled: true, idle_timeout: "200ms" },
      wake: { ports: [{ host_port: port, guest_port: GUEST }] },
    }, ORIGIN);
    cleanup(t).defer(() => hypervisor.delete(id, ORIGIN));
    targets.push({ ip: network.ip!, ip6: network.ip6, port });
    await until("it listens", async () => await talk(GUEST, "x", network.ip!) === "x");
  }

  const clients = new Clients();
  const counts: Record<string, number> = {};
  const requested = new Map<string, number>();
  const checks: Promise<void>[] = [];
  host.hooks.on("standby:decision", ({ instance_id, instance_name, decision, at }) => {
    counts[decision] = (counts[decision] ?? 0) + 1;
    if (decision === "requested") requested.set(instance_id, at);
    if (decision === "restore_failed") clients.wrong.push(`${instance_name} could not be restored`);
    if (decision !== "slept") return;
    const { ip, ip6 } = hypervisor.find(instance_id)!.network;
    const before = requested.get(instance_id);
    if (before === undefined) return; // asked for while the last ones were made, when nobody looked yet
    // Open since before it was decided, and open still: it slept in spite of this one.
    const open = [...clients.connections].filter(([, { to, openedAt, closing }]) =>
      to.ip === ip && openedAt < before && !closing
    );
    for (const [key] of open) clients.wrong.push(`${instance_name} slept while ${key} was open`);
    checks.push(
      table.conntrack.dump(new Set([ip!, ...(ip6 ? [ip6] : [])])).then((flows) => {
        for (const { source, source_port, destination, state } of flows) {
          const connection = clients.connections.get(`${source}:${source_port}>${destination}`);
          if (FINISHED.has(state) || !connection || connection.openedAt >= before) continue;
          const seen = `${before - connection.openedAt} ms before, ${connection.closing ? "closing" : "open"}`;
          clients.wrong.push(
            `${instance_name} slept while the kernel had ${source}:${source_port} as ${state}, ${seen}`,
          );
        }
      }),
    );
  }, { buffer: 100_000 });

  // A kernel that drops events says so some time later; until then nobody knows.
  let over = false;
  const telling = (async () => {
    while (!over) {
      await delay(200 + random() * 1_300);
      table.reconnect();
    }
  })();
  const began = performance.now();
  await Promise.all(targets.map(async (target) => {
    while (clients.events < EVENTS && clients.wrong.length === 0) {
      await clients.burst(target);
      await delay(random() * 700);
    }
  }));
  over = true;
  await telling;
  await Promise.all(checks);
  const took = `${Math.round(performance.now() - began)} ms, slowest answer ${Math.round(clients.slowest)} ms`;
  console.log(`seen: ${clients.events} events, ${lost} lost, ${JSON.stringify(counts)}, ${took}, seed ${seed}`);
  assert.deepEqual(clients.wrong, []);
  assert.ok(counts.slept > INSTANCES, "there were sleeps to look at");
  // Events are lost on, and nobody says so any more: the reconcile alone finds what has ended.
  const sleeping = () => hypervisor.list().every(({ state }) => state === "Standby");
  await until("all sleep", sleeping, 180_000);
  assert.equal(clients.connections.size, 0);
});
