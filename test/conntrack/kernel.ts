// Run by source.test.ts in a network namespace of its own.
import assert from "node:assert/strict";
import { readdirSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { before, test } from "node:test";
import { execa } from "execa";
import type { Flow, FlowKind } from "../../main.ts";
import { ProgramSource } from "../../plugins/conntrack/program.ts";
import { openConntrack } from "../../plugins/conntrack/source.ts";
import { run } from "../../plugins/shared/run.ts";
import { capturedLogs, cleanup, RUNTIME } from "../helpers.ts";
import { burst, children, connected, Heard, isOf, log, RULES, same, started, V4, V6, watched } from "./tracked.ts";

const DENO = "Deno" in globalThis;
const KINDS = DENO ? ["netlink", "program"] as const : ["program"] as const;

before(() => run("nft", ["-f", "-"], { input: RULES }));

for (const kind of KINDS) {
  for (const host of [V4, V6]) {
    test(`${kind}: a connection to ${host} is told from its first packet, and shown by dump()`, async (t) => {
      const { source, heard } = await started(t, kind);
      const connection = await connected(t, host);
      const { socket, source_port, destination_port } = connection;
      const flow = { protocol: "tcp", source: socket.localAddress, source_port, destination: host, destination_port };
      const open = await heard.first("open", isOf(connection, "ESTABLISHED"));
      assert.deepEqual(open, { at: "update", flow: { ...flow, state: "ESTABLISHED" } });
      const first = heard.all.find(isOf(connection));
      assert.deepEqual(first, { at: "new", flow: { ...flow, state: "SYN_SENT" } });
      const own = (await source.dump()).filter(same(connection));
      assert.deepEqual(own, [{ ...flow, state: "ESTABLISHED" }]);
      await run("conntrack", [
        "-D",
        "-p",
        "tcp",
        "-f",
        host === V4 ? "ipv4" : "ipv6",
        "--orig-port-src",
        String(source_port),
      ]);
      await heard.first("gone", (said) => said.at === "destroy" && isOf(connection)(said));
      assert.deepEqual((await source.dump()).filter(same(connection)), []);
      assert.equal(source.stats().malformed, 0);
      assert.ok(source.stats().events >= 3);
    });
  }

  test(`${kind}: a published port's connection is one to who answers it`, async (t) => {
    const { source, heard } = await started(t, kind);
    const connection = await connected(t, V4, 8000, { host: "127.0.0.99", port: 9000 });
    const open = await heard.first("open", isOf(connection, "ESTABLISHED"));
    assert.ok("flow" in open);
    assert.deepEqual([open.flow.destination, open.flow.destination_port], [V4, 8000]);
    assert.ok((await source.dump()).some((flow) => same(connection)(flow) && flow.destination === V4));
  });

  test(`${kind}: only what is watched is told, and dump() shows what it is asked for`, async (t) => {
    const { source, heard } = await started(t, kind);
    const other = await connected(t, "127.0.0.8");
    const wanted = await connected(t, V4);
    await heard.first("open", isOf(wanted, "ESTABLISHED"));
    assert.ok(!heard.all.some(isOf(other)));
    assert.ok(source.stats().skipped > 0);
    const shown = async (addresses?: ReadonlySet<string>) => {
      const flows = await source.dump({ addresses });
      return [flows.filter(same(wanted)).length, flows.filter(same(other)).length];
    };
    assert.deepEqual(await shown(), [1, 0]);
    assert.deepEqual(await shown(new Set(["127.0.0.8"])), [0, 1]);
    assert.deepEqual(await shown(new Set()), [0, 0]);
  });

  // I27
  test(`${kind}: a listener that throws goes on being told`, async (t) => {
    const lines = capturedLogs(t);
    class Throwing extends Heard {
      override event(kind: FlowKind, flow: Flow): void {
        super.event(kind, flow);
        throw new Error("not today");
      }
      override connected(): void {
        super.connected();
        throw new Error("nor now");
      }
    }
    const { source, heard } = await started(t, kind, { listener: new Throwing() });
    for (const _ of [1, 2]) {
      const connection = await connected(t, V4);
      await heard.first("open", isOf(connection, "ESTABLISHED"));
    }
    assert.ok(source.stats().listener_errors >= 3);
    assert.ok(source.stats().connected);
    assert.ok(lines.includes("error: Conntrack listener failed at event: not today"), lines.join("\n"));
  });

  // I12, I27
  test(`${kind}: an overflow is told and counted, and then events come again`, async (t) => {
    const { source, heard } = await started(t, kind, { receiveBuffer: 4096 });
    if (kind === "program") {
      // Without its turn on a processor it reads nothing.
      const child = children().find(({ name }) => name === "conntrack")!;
      process.kill(child.pid, "SIGSTOP");
      burst(3_000);
      process.kill(child.pid, "SIGCONT");
    } else burst(3_000);
    const lost = await heard.first("loss", ({ at }) => at === "lost");
    assert.deepEqual(lost, { at: "lost", reason: "overflow" });
    const from = heard.all.indexOf(lost);
    await heard.first("connected", ({ at }) => at === "connected", from);
    assert.ok(source.stats().overflows > 0);
    assert.equal(source.stats().disconnects, 0);
    const connection = await connected(t, V4);
    await heard.first("open", isOf(connection, "ESTABLISHED"));
    assert.ok((await source.dump()).length >= 3_000, "what was missed is in the table");
    await run("conntrack", ["-D", "-p", "udp"]);
  });

  test(`${kind}: close() ends it at once, and twice is once`, async (t) => {
    const descriptors = () => readdirSync("/proc/self/fd").length;
    await (await started(t, kind)).source.close();
    const open = descriptors();
    const { source, heard } = await started(t, kind);
    const dumping = source.dump();
    const outcome = dumping.then(() => "whole", (error) => error.message);
    await Promise.all([source.close(), source.close()]);
    assert.match(await outcome, /^whole$|^The conntrack source is closing$/);
    const told = heard.all.length;
    await connected(t, V4);
    assert.equal(heard.all.length, told);
    await assert.rejects(source.dump(), /^Error: The conntrack source is closing$/);
    assert.throws(() => source.start(heard), TypeError);
    assert.deepEqual(children().filter(({ name }) => name === "conntrack"), []);
    assert.equal(source.stats().connected, false);
    // Two for the connection just made, and one for its listener.
    assert.ok(descriptors() <= open + 3, `${descriptors()} descriptors, ${open} before`);
  });

  test(`${kind}: dump() rejects with the reason of a signal`, async (t) => {
    const { source } = await started(t, kind);
    await assert.rejects(source.dump({ signal: AbortSignal.abort(new Error("enough")) }), /^Error: enough$/);
    const later = new AbortController();
    const dumping = source.dump({ signal: later.signal });
    later.abort(new Error("no longer"));
    // It may be whole already; it is never anything between.
    await dumping.then((flows) => assert.ok(Array.isArray(flows)), (error) => assert.equal(error.message, "no longer"));
  });
}

// I27
test("program: one that is killed, however often, is started again", async (t) => {
  const lines = capturedLogs(t);
  const { source, heard } = await started(t, "program");
  for (const round of [1, 2]) {
    const from = heard.all.length;
    process.kill(children().find(({ name }) => name === "conntrack")!.pid, "SIGKILL");
    const lost = await heard.first("loss", ({ at }) => at === "lost", from);
    assert.deepEqual(lost, { at: "lost", reason: 'Command "conntrack -E" failed: ended by SIGKILL' });
    assert.equal(source.stats().connected, false);
    await heard.first("connected", ({ at }) => at === "connected", from);
    assert.equal(source.stats().disconnects, round);
    const connection = await connected(t, V4);
    await heard.first("open", isOf(connection, "ESTABLISHED"));
  }
  assert.ok(lines.some((line) => line.startsWith("info: Conntrack events come again")));
});

test("program: one that is not there is told as lost, and tried again", async (t) => {
  capturedLogs(t);
  const path = process.env.PATH;
  cleanup(t).defer(() => void (process.env.PATH = path));
  process.env.PATH = "/nowhere";
  assert.throws(() => openConntrack({ log, mode: "program" }), /^Error: Cannot read conntrack: there is no conntrack/);
  const heard = new Heard();
  const source = new ProgramSource({ log, watched });
  cleanup(t).defer(() => source.close());
  source.start(heard);
  await heard.first("loss", ({ at }) => at === "lost");
  await assert.rejects(source.dump(), /no such program/);
  process.env.PATH = path;
  await heard.first("connected", ({ at }) => at === "connected");
});

if (DENO) {
  test("netlink: events of what happened before a dump() are told before it resolves", async (t) => {
    const { source, heard } = await started(t, "netlink");
    for (let round = 0; round < 50; round++) {
      const connection = await connected(t, V4);
      assert.equal((await source.dump()).filter(same(connection)).length, 1);
      assert.ok(heard.all.some(isOf(connection, "SYN_SENT")));
    }
  });

  test("netlink: a dump() of a large table is whole, and several at once are", async (t) => {
    const { source } = await started(t, "netlink");
    burst(4_000);
    const count = (flows: Flow[]) =>
      new Set(flows.filter(({ protocol }) => protocol === "udp").map((f) => f.destination_port)).size;
    assert.deepEqual((await Promise.all([source.dump(), source.dump(), source.dump()])).map(count), [
      4_000,
      4_000,
      4_000,
    ]);
    await run("conntrack", ["-D", "-p", "udp"]);
  });

  // I12
  test("netlink: the receive buffer is large, beyond what the machine gives to all", async (t) => {
    const { source } = await started(t, "netlink");
    assert.equal(source.stats().receive_buffer, 2 * 40 * 1024 * 1024);
  });

  const script = join(import.meta.dirname!, "listen.ts");
  const listened = async (...command: string[]) => {
    const { stdout } = await execa(command[0], command.slice(1), { stdin: "ignore", timeout: 30_000 });
    return stdout.split("\n");
  };

  test("netlink: a process can exit without closing it", async () => {
    assert.deepEqual(await listened(...RUNTIME, script, "exit"), ["netlink", "connected"]);
  });

  test("netlink: what it may not read is told as lost", async () => {
    const told = await listened("setpriv", "--bounding-set", "-net_admin", ...RUNTIME, script);
    assert.deepEqual(told, ["netlink", "bind: EPERM"]);
  });

  test("openConntrack() takes the program when FFI is refused", async () => {
    const [deno] = RUNTIME;
    const told = await listened(deno, "run", "--allow-all", "--deny-ffi", "--quiet", script);
    assert.deepEqual(told, ["program", "connected"]);
  });
} else {
  test("openConntrack() takes the program where there is no FFI", async () => {
    const source = openConntrack({ log });
    assert.equal(source.name, "program");
    await source.close();
    assert.throws(
      () => openConntrack({ log, mode: "netlink" }),
      /^Error: Cannot read conntrack: this runtime has no FFI/,
    );
  });
}
