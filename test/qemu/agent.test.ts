import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { existsSync } from "node:fs";
import type { Socket } from "node:net";
import { join } from "node:path";
import { test, type TestContext } from "node:test";
import { Agent, AgentError } from "../../plugins/qemu/agent.ts";
import { execute, type GuestExecRequest } from "../../plugins/qemu/exec.ts";
import { rewind } from "../../plugins/qemu/ready.ts";
import { ConnectionLost } from "../../plugins/qemu/socket.ts";
import { clockOffset, identify, reseed, setClock, shutdown, stat } from "../../plugins/qemu/tasks.ts";
import { delay } from "../../plugins/shared/async.ts";
import { cleanup, temporaryFolder, until } from "../helpers.ts";
import { boot, type Guest, report, restore, skipGuest, standby } from "./guest.ts";
import { type Question, say, scripted } from "./scripted.ts";

const late = { name: "TimeoutError" };

function agentAt(t: TestContext, path: string): Agent {
  const agent = new Agent(path);
  cleanup(t).defer(() => agent[Symbol.asyncDispose]());
  return agent;
}

/** An agent that synchronises, and leaves the rest to `answer`. */
async function answering(t: TestContext, answer: (socket: Socket, question: Question, count: number) => void) {
  const synced: number[] = [];
  const path = await scripted(t, {
    answer: (socket, question, count) => {
      if (question.execute !== "guest-sync-delimited") return answer(socket, question, count);
      synced.push(count);
      say(socket, Buffer.of(0xff), { return: question.arguments.id });
    },
  });
  return { agent: agentAt(t, path), synced };
}

test("call() synchronises once, then asks one question after the other", async (t) => {
  const seen: string[] = [];
  const { agent, synced } = await answering(t, (socket, { execute, arguments: { n } }) => {
    seen.push(`${execute} ${n}`);
    setTimeout(() => say(socket, { return: n }, ""), 5);
  });
  const answers = await Promise.all([1, 2, 3].map((n) => agent.call("guest-echo", { n })));
  assert.deepEqual(answers, [1, 2, 3]);
  assert.deepEqual(seen, ["guest-echo 1", "guest-echo 2", "guest-echo 3"]);
  assert.deepEqual(synced, [1]);
});

test("call() rejects with the agent's own reason, and the connection stays", async (t) => {
  const error = { class: "CommandNotFound", desc: "The command guest-x has not been found" };
  const { agent, synced } = await answering(t, (socket) => say(socket, { error }));
  for (const _ of [1, 2]) {
    await assert.rejects(agent.call("guest-x"), (thrown) => {
      assert.ok(thrown instanceof AgentError);
      assert.equal(thrown.class, "CommandNotFound");
      assert.match(thrown.message, /^Guest agent command "guest-x" failed: The command guest-x/);
      return true;
    });
  }
  assert.deepEqual(synced, [1]);
});

test("call() finds its own answer behind what came too late for others", async (t) => {
  const path = await scripted(t, {
    answer: (socket, { execute, arguments: { id } }) => {
      if (execute !== "guest-sync-delimited") return say(socket, { return: "mine" });
      // Of a question before, cut off; a refusal of what was cut off; the synchronisation of a client before.
      say(socket, '"late"}\n', { return: "late" }, { error: { class: "GenericError", desc: "JSON parse error" } });
      say(socket, Buffer.of(0xff), { return: 12 }, { return: "later" }, Buffer.of(0xff), { return: id });
    },
  });
  assert.equal(await agentAt(t, path).call("guest-ping"), "mine");
});

test("call() connects and synchronises anew after a deadline, an abort, an end and what makes no sense", async (t) => {
  const cases: [string, (socket: Socket) => void, object][] = [
    ["silence", () => {}, late],
    ["the end", (socket) => socket.end(), { name: "ConnectionLost" }],
    ["half an answer", (socket) => socket.end('{"return'), { name: "ConnectionLost" }],
    ["no JSON", (socket) => say(socket, "what?\n"), { name: "ConnectionLost", message: /no JSON/ }],
    ["too much", (socket) => say(socket, "x".repeat(2_000)), { name: "ConnectionLost", message: /1000 bytes/ }],
  ];
  for (const [what, act, expected] of cases) {
    const { agent, synced } = await answering(t, (socket, _question, count) => {
      if (count === 1) act(socket);
      else say(socket, { return: "again" });
    });
    const timeout = expected === late ? 1_000 : 10_000;
    await assert.rejects(agent.call("guest-first", {}, { timeout, max: 1_000 }), expected, what);
    assert.equal(await agent.call("guest-second"), "again", what);
    assert.deepEqual(synced, [1, 2], what);
  }
  const { agent, synced } = await answering(t, (socket, { execute }) => {
    if (execute === "guest-second") say(socket, { return: "again" });
  });
  const abort = new AbortController();
  const first = agent.call("guest-first", {}, { signal: abort.signal });
  const second = agent.call("guest-second");
  abort.abort(new Error("enough"));
  await assert.rejects(first, /enough/);
  assert.equal(await second, "again");
  assert.ok(synced.length <= 2);
});

test("call() gives up its place when it waited too long for others, and they go on", async (t) => {
  let release = () => {};
  const asked: string[] = [];
  const { agent } = await answering(t, (socket, { execute }) => {
    asked.push(execute);
    if (execute === "guest-slow") release = () => say(socket, { return: "slow" });
    else say(socket, { return: "quick" });
  });
  const slow = agent.call("guest-slow");
  await until("it was asked", () => asked.length === 1);
  await assert.rejects(agent.call("guest-impatient", {}, { timeout: 30 }), late);
  const quick = agent.call("guest-quick");
  release();
  assert.deepEqual(await Promise.all([slow, quick]), ["slow", "quick"]);
  assert.deepEqual(asked, ["guest-slow", "guest-quick"]);
});

test("call() drops a guest that talks unasked, and is not confused by what it said", async (t) => {
  const { agent, synced } = await answering(t, (socket) => say(socket, { return: 1 }, { return: 2 }));
  assert.equal(await agent.call("guest-a"), 1);
  const second = await agent.call("guest-b").catch((error) => error);
  assert.ok(second === 1 || second instanceof ConnectionLost);
  assert.ok(synced.length >= 1);
});

test("ready() waits for an agent that is not there yet, until its signal aborts", async (t) => {
  const path = join(temporaryFolder(t), "socket");
  const agent = agentAt(t, path);
  const enough = new AbortController();
  const never = agent.ready({ signal: enough.signal });
  enough.abort(new Error("enough"));
  await assert.rejects(never, /enough/);
  const ready = agent.ready({ signal: AbortSignal.timeout(60_000), every: 500 });
  await scripted(t, {
    answer: (socket, { execute, arguments: { id } }, count) => {
      // The guest has not started its agent when the first ones ask.
      if (count < 3) return;
      if (execute === "guest-ping") say(socket, { return: {} });
      else say(socket, Buffer.of(0xff), { return: id });
    },
  }, path);
  await ready;
});

test("an agent that is closed ends its calls and takes no more", async (t) => {
  const { agent } = await answering(t, () => {});
  const call = agent.call("guest-ping");
  const waiting = agent.call("guest-ping");
  const both = Promise.allSettled([call, waiting]);
  await agent[Symbol.asyncDispose]();
  for (const { reason } of await both as PromiseRejectedResult[]) {
    assert.ok(reason instanceof ConnectionLost, `${reason}`);
  }
  await assert.rejects(agent.call("guest-ping"), /closed here/);
});

test("setClock() corrects until it sees the clock right", async (t) => {
  let offset = -300_000;
  let sets = 0;
  const { agent } = await answering(t, (socket, { execute, arguments: { time } }) => {
    if (execute === "guest-get-time") return say(socket, { return: Math.round((Date.now() + offset) * 1e6) });
    // The first time it comes out far too late; and there is no program to write the machine's own clock with.
    offset = Number(time) / 1e6 - Date.now() - (sets++ === 0 ? 100_000 : 0);
    say(socket, { error: { class: "GenericError", desc: "hwclock failed to set hardware clock to system time" } });
  });
  const { offset: left, uncertainty } = await setClock(agent, { within: 30_000 });
  assert.ok(Math.abs(left) + uncertainty <= 30_000, `${left} ± ${uncertainty}`);
  assert.equal(sets, 2);
});

test("setClock() makes up for a guest that always takes its time", async (t) => {
  let offset = -300_000;
  const { agent } = await answering(t, async (socket, { execute, arguments: { time } }) => {
    await delay(60);
    if (execute === "guest-get-time") say(socket, { return: Math.round((Date.now() + offset) * 1e6) });
    else offset = Number(time) / 1e6 - Date.now();
    await delay(60);
    if (execute !== "guest-get-time") return say(socket, { return: {} });
  });
  let left = Infinity;
  // One of its pauses may be longer than the others on a busy machine.
  for (let tries = 0; tries < 5 && Math.abs(left) >= 50; tries++) left = (await setClock(agent, { within: 0 })).offset;
  assert.ok(Math.abs(left) < 50, `${left}`);
});

// R10: a guest with a real hwclock answers up to a second after its clock is right.
test("setClock() tells that it has set the clock before a slow agent answers", async (t) => {
  const told = Promise.withResolvers<void>();
  let offset = -300_000;
  const { agent } = await answering(t, async (socket, { execute, arguments: { time } }) => {
    if (execute === "guest-get-time") return say(socket, { return: Math.round((Date.now() + offset) * 1e6) });
    offset = Number(time) / 1e6 - Date.now();
    await told.promise;
    say(socket, { return: {} });
  });
  const { offset: left } = await setClock(agent, { told: told.resolve, within: 1_000 });
  assert.ok(Math.abs(left) <= 1_000, `${left}`);
});

// R10: nobody knows what such a clock says.
test("rewind() is not content with a clock that it is not sure of, or sees to be wrong", async (t) => {
  const { agent: slow } = await answering(t, async (socket, { execute }) => {
    if (execute === "guest-get-time") await delay(220);
    say(socket, { return: execute === "guest-get-time" ? Date.now() * 1e6 : {} });
  });
  const { agent: wrong } = await answering(t, (socket, { execute }) => {
    say(socket, { return: execute === "guest-get-time" ? (Date.now() - 300_000) * 1e6 : {} });
  });
  for (const agent of [slow, wrong]) assert.equal(await rewind(agent, AbortSignal.timeout(180_000), () => {}), false);
});

test("execute() takes no answer that makes no sense, whatever it would cost to make some of it", async (t) => {
  const answers: [unknown, unknown][] = [
    [{}, {}],
    [{ pid: "1" }, {}],
    [null, {}],
    [{ pid: 1 }, { exited: 1 }],
    [{ pid: 1 }, { exited: true, exitcode: "0" }],
    [{ pid: 1 }, { exited: true, exitcode: 0, "out-data": { length: 2 ** 32 - 1 } }],
    [{ pid: 1 }, { exited: true, exitcode: 0, "err-data": [1] }],
  ];
  for (const [started, status] of answers) {
    const { agent } = await answering(t, (socket, { execute }) => {
      say(socket, { return: execute === "guest-exec" ? started : status });
    });
    const work = execute(agent, { command: ["true"], timeout_ms: 10_000, max_output: 100 });
    await assert.rejects(work, (error) => error instanceof ConnectionLost, JSON.stringify([started, status]));
  }
});

test("execute() kills what it is told of only after its client has left", async (t) => {
  const asked: unknown[] = [];
  let release = () => {};
  const { agent } = await answering(t, (socket, { execute, arguments: { path, arg, pid } }) => {
    asked.push(execute === "guest-exec" ? [path, ...arg as string[]].at(-1) : pid);
    if (path === "sleep") release = () => say(socket, { return: { pid: 7 } });
    else say(socket, { return: execute === "guest-exec" ? { pid: 8 } : { exited: true } });
  });
  const client = new AbortController();
  const command = { command: ["sleep", "600"], plain: true, timeout_ms: 10_000, max_output: 100 };
  const work = assert.rejects(execute(agent, { ...command, signal: client.signal }), /it left/);
  await until("it was asked", () => asked.length === 1);
  client.abort(new Error("it left"));
  await work;
  release();
  await until("it is killed and gone", () => asked.length === 4);
  assert.deepEqual(asked, ["600", "7", 8, 7]);
});

test("what an agent says of an error is cut", async (t) => {
  const { agent } = await answering(t, (socket) => {
    say(socket, { error: { class: "GenericError", desc: "x".repeat(100_000) } });
  });
  await assert.rejects(agent.call("guest-ping"), (error: Error) => error.message.length < 1_000);
});

test("reseed() says that the seed is used later when the guest has neither perl nor python", async (t) => {
  const inputs: number[] = [];
  const { agent } = await answering(t, (socket, { execute, arguments: asked }) => {
    if (execute === "guest-exec-status") {
      return say(socket, {
        return: { exited: true, exitcode: 0, "out-data": Buffer.from("later\n").toString("base64") },
      });
    }
    inputs.push(Buffer.from(String(asked["input-data"]), "base64").length);
    if (asked.path === "perl") {
      return say(socket, { error: { class: "GenericError", desc: 'Failed to execute child process "perl"' } });
    }
    say(socket, { return: { pid: 5 } });
  });
  assert.equal(await reseed(agent), "later");
  assert.deepEqual(inputs, [256, 256]);
});

/** A guest that has booted, and its agent. */
async function booted(t: TestContext, machine: "microvm" | "q35" = "microvm"): Promise<{ guest: Guest; agent: Agent }> {
  const guest = await boot(t, { machine });
  const agent = agentAt(t, guest.agent);
  await agent.ready({ signal: AbortSignal.timeout(180_000) });
  return { guest, agent };
}

test("the agent of a real guest runs commands, looks at paths, and shuts it down", { skip: skipGuest }, async (t) => {
  const { guest, agent } = await booted(t);
  const run = (command: string[], more: Partial<GuestExecRequest> = {}) =>
    execute(agent, { command, timeout_ms: 120_000, max_output: 65_536, ...more });
  const result = { exit_code: 0, stdout: "", stderr: "", timed_out: false, truncated: false };

  assert.deepEqual(await run(["true"]), result);
  const script = 'pwd; echo "$A"; cat; echo wrong >&2; exit 3';
  const options = { input: "in\n", working_dir: "/run", env: { A: "b  c" } };
  const expected = { ...result, exit_code: 3, stdout: "/run\nb  c\nin\n", stderr: "wrong\n" };
  assert.deepEqual(await run(["sh", "-c", script], options), expected);
  assert.deepEqual(await run(["echo", "a b", "$HOME", "ü\n"]), { ...result, stdout: "a b $HOME ü\n\n" });
  assert.equal((await run(["no-such-program"])).exit_code, 127);
  assert.equal((await run(["true"], { working_dir: "/nowhere" })).exit_code, 126);
  await assert.rejects(run(["echo", "x".repeat(200_000)]), { code: "invalid_request", message: /longer than/ });
  assert.equal((await run(["sh", "-c", "kill -TERM $$"])).exit_code, 143);
  const much = await run(["sh", "-c", "yes | head -c 300000"], { max_output: 10 });
  assert.deepEqual(much, { ...result, stdout: "y\ny\ny\ny\ny\n", truncated: true });

  const slow = await run(["sh", "-c", "echo begun; sleep 1000 & sleep 1000"], { timeout_ms: 5_000 });
  assert.deepEqual(slow, { ...result, exit_code: 137, stdout: "begun\n", timed_out: true });
  const abort = new AbortController();
  const aborted = run(["sh", "-c", "touch /run/begun; exec sleep 1000"], { signal: abort.signal, timeout_ms: 300_000 });
  const rejected = assert.rejects(aborted, /enough/);
  await until("it has begun", async () => (await stat(agent, "/run/begun", true)).exists, 180_000);
  abort.abort(new Error("enough"));
  await rejected;
  assert.equal((await run(["pidof", "sleep"])).exit_code, 1, "none of them is left");

  const absent = { is_dir: false, is_file: false, is_symlink: false, link_target: null, mode: 0, size: 0 };
  const there = { ...absent, exists: true };
  await run(["sh", "-c", "cd /run; printf 123 >'a b'; chmod 640 'a b'; ln -s 'a b' 'l\n'; ln -s none dangling"]);
  assert.deepEqual(await stat(agent, "/", true), {
    ...await stat(agent, "/", true),
    exists: true,
    is_dir: true,
    mode: 0o755,
  });
  assert.deepEqual(await stat(agent, "/run/a b", false), { ...there, is_file: true, mode: 0o640, size: 3 });
  const link = { ...there, is_symlink: true, link_target: "a b", mode: 0o777, size: 3 };
  assert.deepEqual(await stat(agent, "/run/l\n", false), link);
  assert.deepEqual(await stat(agent, "/run/l\n", true), { ...there, is_file: true, mode: 0o640, size: 3 });
  for (const path of ["/run/none", "/run/a b/c", "/run/dangling"]) {
    assert.deepEqual(await stat(agent, path, true), { ...absent, exists: false }, path);
  }
  await shutdown(agent);
  assert.equal(await guest.ended, 0);
  await assert.rejects(agent.ping(), (error) => error instanceof Error);
});

for (const machine of ["microvm", "q35"] as const) {
  // R10 (the clock after a restore), F1 and F3 (who a fork is, and its random numbers): what the guest does for them.
  test(
    `a restored ${machine} guest goes on, with a new clock, seed, name and address`,
    { skip: skipGuest },
    async (t) => {
      const { guest, agent } = await booted(t, machine);
      for (const requests of [1, 2]) assert.equal((await report(guest)).requests, requests);
      await setClock(agent);
      await standby(guest);
      await assert.rejects(agent.ping(), (error) => error instanceof Error);

      const drawn = new Set<string>();
      for (const hostname of ["one", "two"]) {
        const fork = await boot(t, { machine, incoming: true, forkOf: join(guest.folder, "ram") });
        using qmp = await fork.qmp();
        await restore(fork, qmp, guest.folder);
        // Until it has an address of its own it must not be heard.
        await qmp.execute("set_link", { name: "net0", up: false });
        await qmp.execute("cont");
        const its = agentAt(t, fork.agent);
        assert.equal(await reseed(its), "now");
        const command = ["sh", "-c", "cat /proc/sys/kernel/random/uuid; head -c 16 /dev/urandom | xxd -p"];
        drawn.add((await execute(its, { command, timeout_ms: 20_000, max_output: 100 })).stdout);
        const before = await clockOffset(its, { timeout: 60_000 });
        assert.ok(before.offset < 0, "it was asleep, and so was its clock");
        // On a busy machine some questions take too long to be sure of their answers.
        const { offset, uncertainty } = await setClock(its, { rounds: 20 });
        assert.ok(Math.abs(offset) + uncertainty < 100, `${offset} ± ${uncertainty}`);
        await identify(its, {
          hostname,
          mac: "52:54:00:00:00:02",
          ip: "10.0.2.15/24",
          gateway: "10.0.2.2",
          ip6: "fdd0::5/64",
        });
        await qmp.execute("set_link", { name: "net0", up: true });
        const answer = await report(fork);
        assert.deepEqual([answer.hostname, answer.requests], [hostname, 3]);
        const shown = await execute(its, { command: ["ip", "addr"], timeout_ms: 20_000, max_output: 10_000 });
        for (const each of ["52:54:00:00:00:02", "10.0.2.15/24", "fdd0::5/64"]) {
          assert.ok(shown.stdout.includes(each), each);
        }
        await qmp.quit();
      }
      assert.equal(drawn.size, 2, "both drew from the same RAM");

      const woken = await boot(t, { machine, incoming: true, folder: guest.folder });
      using qmp = await woken.qmp();
      await restore(woken, qmp);
      await qmp.execute("cont");
      const again = agentAt(t, woken.agent);
      await again.ready({ signal: AbortSignal.timeout(180_000) });
      const answer = await report(woken);
      assert.deepEqual([answer.hostname, answer.requests], ["guest", 3], "the forks have not touched it");
      assert.ok(existsSync(join(guest.folder, "ram")));
      await qmp.quit();
    },
  );
}
