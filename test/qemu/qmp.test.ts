import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { mkdirSync, renameSync } from "node:fs";
import type { Socket } from "node:net";
import { join } from "node:path";
import { test, type TestContext } from "node:test";
import { execa } from "execa";
import { Qmp, QmpError, type QmpEvent, type QmpOptions } from "../../plugins/qemu/qmp.ts";
import { ConnectionLost } from "../../plugins/qemu/socket.ts";
import { cleanup, temporaryFolder, until } from "../helpers.ts";
import { skipQemu } from "./guest.ts";
import { type Question, say, scripted } from "./scripted.ts";

const GREETING = { QMP: { version: { qemu: { major: 9, minor: 1, micro: 2 } }, capabilities: ["oob"] } };
const greet = (socket: Socket) => say(socket, GREETING);

/** Connected to a script that agrees on the protocol and leaves the rest to `answer`. */
async function connected(t: TestContext, answer: (socket: Socket, question: Question) => void, options?: QmpOptions) {
  const path = await scripted(t, {
    greet,
    answer: (socket, question) =>
      question.execute === "qmp_capabilities" ? say(socket, { return: {}, id: question.id }) : answer(socket, question),
  });
  const qmp = await Qmp.connect(path, options);
  cleanup(t).defer(() => qmp.close());
  return qmp;
}

const lost = (pattern: RegExp) => (error: unknown) => error instanceof ConnectionLost && pattern.test(error.message);
const late = { name: "TimeoutError" };

test("connect() is greeted, agrees on the protocol and knows the version", async (t) => {
  const asked: Question[] = [];
  const answer = (socket: Socket, question: Question) => {
    asked.push(question);
    say(socket, { return: {}, id: question.id });
  };
  const qmp = await Qmp.connect(await scripted(t, { greet, answer }));
  assert.equal(qmp.version, "9.1.2");
  assert.deepEqual(asked, [{ execute: "qmp_capabilities", arguments: {}, id: 1 }]);
  qmp.close();
  qmp.close();
  assert.match((await qmp.closed).message, /closed here/);
  await assert.rejects(qmp.execute("stop"), lost(/^Cannot run QMP command "stop": .*closed here$/));
});

test("connect() rejects, and leaves nothing open, when it is not greeted", async (t) => {
  const nothing = () => {};
  const cases: [string, (socket: Socket) => void, object][] = [
    ["silence", nothing, late],
    ["the end", (socket) => socket.end(), { name: "ConnectionLost" }],
    ["no JSON", (socket) => say(socket, "hello\n"), { name: "ConnectionLost", message: /no JSON: "hello"$/ }],
    ["no object", (socket) => say(socket, "[1]\n"), { name: "ConnectionLost", message: /no object/ }],
    ["an answer", (socket) => say(socket, { return: {}, id: 7 }), { name: "ConnectionLost", message: /not asked/ }],
    ["a long line", (socket) => say(socket, "x".repeat(2_000)), { name: "ConnectionLost", message: /1000 bytes$/ }],
  ];
  for (const [what, greet, expected] of cases) {
    const path = await scripted(t, { greet, answer: nothing });
    const timeout = expected === late ? 1_000 : 10_000;
    await assert.rejects(Qmp.connect(path, { timeout, maxLine: 1_000 }), expected, what);
  }
  await assert.rejects(Qmp.connect(join(temporaryFolder(t), "none")), { code: "ENOENT" });
  const path = await scripted(t, { greet: nothing, answer: nothing });
  await assert.rejects(Qmp.connect(path, { signal: AbortSignal.abort(new Error("no more")) }), /no more/);
  const abort = new AbortController();
  const connecting = Qmp.connect(path, { signal: abort.signal });
  abort.abort(new Error("enough"));
  await assert.rejects(connecting, /enough/);
});

test("connect() reaches a socket whose path is longer than the kernel takes one to be", async (t) => {
  const answer = (socket: Socket, { id }: Question) => say(socket, { return: {}, id });
  const path = await scripted(t, { greet, answer });
  const folder = join(temporaryFolder(t), "x".repeat(120));
  mkdirSync(folder);
  renameSync(path, join(folder, "socket"));
  (await Qmp.connect(join(folder, "socket"))).close();
  await assert.rejects(Qmp.connect(join(folder, "none")), { code: "ENOENT" });
});

test("execute() gives each answer to its question, whatever the order and however it is cut", async (t) => {
  const waiting: Question[] = [];
  const qmp = await connected(t, (socket, question) => {
    if (waiting.push(question) < 3) return;
    const lines = waiting.reverse().map(({ id, execute }) => JSON.stringify({ return: `ö ${execute}`, id })).join(
      "\r\n",
    );
    for (const byte of Buffer.from(`${lines}\n`)) say(socket, Buffer.of(byte));
  });
  const answers = await Promise.all(["a", "b", "c"].map((command) => qmp.execute(command)));
  assert.deepEqual(answers, ["ö a", "ö b", "ö c"]);
});

test("execute() rejects with QEMU's own reason", async (t) => {
  const error = { class: "DeviceNotFound", desc: "Device 'x' not found" };
  const qmp = await connected(t, (socket, { id }) => say(socket, { error, id }));
  await assert.rejects(qmp.execute("set_link"), (error) => {
    assert.ok(error instanceof QmpError);
    assert.equal(error.class, "DeviceNotFound");
    assert.equal(error.message, `QMP command "set_link" failed: Device 'x' not found`);
    return true;
  });
});

test("execute() drops an answer that comes after its deadline or an abort, and the next is not confused", async (t) => {
  const held: number[] = [];
  const qmp = await connected(t, (socket, { execute, id }) => {
    if (execute === "slow") return void held.push(id!);
    for (const each of held.splice(0)) say(socket, { return: "late", id: each });
    say(socket, { return: "in time", id });
  });
  await assert.rejects(qmp.execute("slow", {}, { timeout: 20 }), late);
  const abort = new AbortController();
  const slow = qmp.execute("slow", {}, { signal: abort.signal });
  abort.abort(new Error("overtaken"));
  await assert.rejects(slow, /overtaken/);
  await until("both were asked", () => held.length === 2);
  assert.equal(await qmp.execute("quick"), "in time");
  await assert.rejects(qmp.execute("never", {}, { signal: AbortSignal.abort(new Error("before")) }), /before/);
});

const deep = (levels: number) => `{"id": "none", "x": ${"[".repeat(levels)}${"]".repeat(levels)}}`;

test("execute() rejects for all that are under way when the socket closes, or what comes makes no sense", async (t) => {
  const cases: [string, (socket: Socket) => void, RegExp][] = [
    ["the end", (socket) => socket.end(), /^QMP command "a" got no answer: /],
    ["a reset", (socket) => socket.destroy(), /^QMP command "a" got no answer: /],
    ["half a line", (socket) => socket.end('{"return": {'), /got no answer/],
    ["no JSON", (socket) => say(socket, "{]\n"), /no JSON: "\{\]"/],
    [
      "no id",
      (socket) => say(socket, { error: { class: "GenericError", desc: "JSON parse error" } }),
      /not asked.*parse/,
    ],
    ["an event that is none", (socket) => say(socket, '{"event": {"toString": 1, "valueOf": 1}}\n'), /not asked/],
    ["more depth than there is stack", (socket) => say(socket, `${deep(200_000)}\n`), /not asked|call stack/],
    ["too much", (socket) => say(socket, `{"return": "${"x".repeat(2_000)}`), /more than 1000 bytes/],
  ];
  for (const [what, act, pattern] of cases) {
    let asked = 0;
    const maxLine = what === "too much" ? 1_000 : 1_000_000;
    const qmp = await connected(t, (socket) => void (++asked === 2 && act(socket)), { maxLine });
    const both = await Promise.allSettled([qmp.execute("a"), qmp.execute("b")]);
    assert.deepEqual(both.map(({ status }) => status), ["rejected", "rejected"], what);
    assert.ok(
      lost(pattern)((both[0] as PromiseRejectedResult).reason),
      `${what}: ${(both[0] as PromiseRejectedResult).reason}`,
    );
    await qmp.closed;
  }
});

test("onEvent is called with each event in order, between answers and without a question", async (t) => {
  const events: QmpEvent[] = [];
  const timestamp = { seconds: 1_700_000_000, microseconds: 250_900 };
  const qmp = await connected(t, (socket, { id }) => {
    say(socket, { event: "STOP", timestamp }, { return: {}, id }, {
      event: "SHUTDOWN",
      data: { guest: true },
      timestamp,
    });
  }, { onEvent: (event) => events.push(event) });
  await qmp.execute("stop");
  await until("the second one", () => events.length === 2);
  const at = 1_700_000_000_250;
  assert.deepEqual(events, [{ event: "STOP", data: {}, at }, { event: "SHUTDOWN", data: { guest: true }, at }]);
});

test("quit() resolves when the connection ends, with and without an answer before", async (t) => {
  for (const answers of [true, false]) {
    const qmp = await connected(t, (socket, { id }) => {
      if (answers) say(socket, { return: {}, id });
      socket.end();
    });
    await qmp.quit();
  }
  const stuck = await connected(t, (socket, { id }) => say(socket, { return: {}, id }));
  await assert.rejects(stuck.quit({ timeout: 50 }), late);
});

test(
  "Qmp speaks with a real QEMU: one client after the other, events, refusals, its end",
  { skip: skipQemu },
  async (t) => {
    const folder = temporaryFolder(t);
    const path = join(folder, "qmp.sock");
    const args = ["-M", "none", "-display", "none", "-nodefaults", "-S", "-qmp", "unix:qmp.sock,server=on,wait=off"];
    const child = execa("qemu-system-x86_64", args, { cwd: folder, stdin: "ignore", reject: false });
    cleanup(t).defer(async () => {
      child.kill("SIGKILL");
      await child;
    });
    let first!: Qmp;
    await until("QEMU listens", async () => {
      try {
        first = await Qmp.connect(path);
        return true;
      } catch (error) {
        if (!["ENOENT", "ECONNREFUSED"].includes((error as NodeJS.ErrnoException).code ?? "")) throw error;
        return false;
      }
    });
    const events: string[] = [];
    assert.match(first.version, /^\d+\.\d+\.\d+$/);
    await assert.rejects(Qmp.connect(path, { timeout: 1_000 }), late, "it greets one client at a time");
    first.close();
    const qmp = await Qmp.connect(path, { onEvent: ({ event }) => events.push(event) });
    assert.equal((await qmp.execute("query-status") as { status: string }).status, "prelaunch");
    await qmp.execute("cont");
    await assert.rejects(qmp.execute("no-such-command"), { name: "QmpError", class: "CommandNotFound" });
    await assert.rejects(qmp.execute("device_del", { id: "x" }), { name: "QmpError", class: "DeviceNotFound" });
    assert.ok((await qmp.execute("query-qmp-schema") as unknown[]).length > 100, "an answer in many pieces");
    await qmp.quit();
    await child;
    assert.deepEqual(events, ["RESUME", "SHUTDOWN"]);
    await assert.rejects(Qmp.connect(path), { name: "Error" });
  },
);
