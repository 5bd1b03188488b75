import assert from "node:assert/strict";
import { describe, it } from "node:test";
import { DormouseError, type Host, VERSION } from "../../main.ts";
import { capturedLogs, startWith, temporaryFolder } from "../helpers.ts";
import { plugin } from "./vocabulary.ts";

/** Fails unless what was thrown carries the code and matches the message. */
function coded(code: string, message: RegExp) {
  return (error: unknown) => {
    assert.ok(error instanceof DormouseError, String(error));
    assert.equal(error.code, code);
    assert.match(error.message, message);
    return true;
  };
}

describe("startHost()", () => {
  it("sets plugins up after those whose services they require, then asks host:ready", async (t) => {
    const seen: string[] = [];
    const host = await startWith(t, [
      plugin("c", {
        requires: ["second", "network?"],
        setup: ({ use, find, hooks }) => {
          seen.push(`c has ${use("second").name} and ${find("network")}`);
          hooks.guard("host:ready", ({ signal }) => void seen.push(`ready, aborted ${signal.aborted}`));
        },
      }),
      plugin("b", {
        requires: ["first"],
        provides: ["second"],
        setup: ({ use, provide }) => provide("second", { name: `b of ${use("first").name}` }),
      }),
      plugin("a", { provides: ["first"], setup: async ({ provide }) => provide("first", { name: "a" }) }),
    ]);
    assert.deepEqual(seen, ["c has b of a and undefined", "ready, aborted false"]);
    assert.equal(host.use("second").name, "b of a");
  });

  it("gives each plugin its host", async (t) => {
    const folder = temporaryFolder(t);
    let host!: Host;
    const logs = capturedLogs(t);
    await startWith(t, [plugin("a"), plugin("b", { setup: (given) => void (host = given) }), plugin("c")], { folder });
    assert.equal(host.version, VERSION);
    assert.equal(host.dataDir, `${folder}/data`);
    assert.deepEqual([...host.plugins], [["a", true], ["b", true], ["c", true]]);
    assert.equal(host.error("not_found", "x").status, 404);
    assert.deepEqual([host.veto("busy", "x").name, host.veto("busy", "x").code], ["Veto", "busy"]);
    host.log.info("Slept {id}", { id: 5 });
    assert.deepEqual(logs, ["info: Slept 5"]);
  });

  it("refuses a service that a plugin does not declare, by name", async (t) => {
    const cases: [(host: Host) => void, RegExp][] = [
      [({ use }) => use("first"), /^Cannot set up plugin "x": Plugin "x" uses "first" without requiring it$/],
      [({ find }) => find("store"), /Plugin "x" uses "store" without requiring it$/],
      [({ use }) => use("network"), /Plugin "x" uses "network", which is not there: require it without "\?"$/],
      [({ provide }) => provide("first", { name: "" }), /Plugin "x" provides "first" without saying so$/],
      [() => {}, /^Cannot set up plugin "x": it did not provide "second"$/],
    ];
    for (const [setup, message] of cases) {
      const x = plugin("x", { requires: ["network?"], provides: ["second"], setup });
      await assert.rejects(startWith(t, [x]), coded("plugin_failed", message));
    }
  });

  it("closes what was up, the failed plugin's own part first, when a setup throws", async (t) => {
    const seen: string[] = [];
    const closes = (name: string) => plugin(name, { setup: ({ defer }) => defer(() => void seen.push(name)) });
    const cause = new Error("no such bridge");
    const failing = plugin("failing", {
      setup({ defer }) {
        defer(() => void seen.push("failing"));
        throw cause;
      },
    });
    await assert.rejects(startWith(t, [closes("a"), closes("b"), failing, closes("later")]), (error: DormouseError) => {
      assert.equal(error.cause, cause);
      return coded("plugin_failed", /^Cannot set up plugin "failing": no such bridge$/)(error);
    });
    assert.deepEqual(seen, ["failing", "b", "a"]);
  });

  it("keeps the code of a plugin's own error, and names the plugin of a failed host:ready", async (t) => {
    const own = plugin("own", { setup: (host) => Promise.reject(host.error("store_locked", "Another host")) });
    await assert.rejects(startWith(t, [own]), coded("store_locked", /^Cannot set up plugin "own": Another host$/));
    let closed = false;
    const late = plugin("late", {
      setup({ hooks, defer }) {
        defer(() => void (closed = true));
        hooks.guard("host:ready", () => Promise.reject(new Error("boom")));
      },
    });
    await assert.rejects(
      startWith(t, [late]),
      coded("guard_failed", /^Guard "host:ready" of plugin "late" failed: boom$/),
    );
    assert.equal(closed, true);
  });

  it("fails when a setup is past its deadline, and closes what that one opens later still", async (t) => {
    const go = Promise.withResolvers<void>();
    const late = Promise.withResolvers<string[]>();
    const slow = plugin("slow", {
      provides: ["first"],
      async setup({ signal, defer, hooks, provide }) {
        const seen: string[] = [];
        await go.promise;
        seen.push(`aborted ${signal.aborted}`);
        defer(() => void seen.push("closed"));
        provide("first", { name: "slow" });
        hooks.on("test:event", () => void seen.push("called"));
        hooks.publish("test:event", 1);
        setImmediate(() => late.resolve(seen));
      },
    });
    const started = startWith(t, [slow], { host: { setup_timeout: "5ms" } });
    await assert.rejects(
      started,
      coded("plugin_timeout", /^Cannot set up plugin "slow": it ran past its deadline of 5 ms$/),
    );
    go.resolve();
    assert.deepEqual(await late.promise, ["aborted true", "closed"]);
  });
});

describe("close()", () => {
  it("runs each closer once, last in first out, when it is called twice", async (t) => {
    const seen: string[] = [];
    const closes = (name: string) =>
      plugin(name, {
        setup({ defer, signal, plugins }) {
          signal.addEventListener(
            "abort",
            () => seen.push(`${name} aborted: ${(signal.reason as DormouseError).code}`),
          );
          defer(() => void seen.push(`${name}1`));
          defer(async () => {
            await Promise.resolve();
            seen.push(`${name}2 ${[...plugins.values()].join()}`);
          });
        },
      });
    const host = await startWith(t, [closes("a"), closes("b")]);
    const both = [host.close(), host.close()];
    assert.equal(both[0], both[1]);
    await Promise.all(both);
    await host[Symbol.asyncDispose]();
    const aborted = ["a aborted: shutting_down", "b aborted: shutting_down"];
    assert.deepEqual(seen, [...aborted, "b2 true,true", "b1", "a2 true,false", "a1"]);
  });

  it("runs all closers and logs each failure when some throw or hang", async (t) => {
    const logs = capturedLogs(t);
    const seen: string[] = [];
    const host = await startWith(t, [
      plugin("first", { setup: ({ defer }) => defer(() => void seen.push("first")) }),
      plugin("throws", {
        setup({ defer }) {
          defer(() => void seen.push("throws"));
          defer(() => {
            throw new Error("sync");
          });
          defer(() => Promise.reject(new Error("async")));
        },
      }),
      plugin("hangs", { setup: ({ defer }) => defer(() => new Promise(() => {})) }),
    ], { host: { close_timeout: "1ms" } });
    await host.close();
    assert.deepEqual(seen, ["throws", "first"]);
    assert.deepEqual(logs, [
      "error: Closing hangs failed: it ran past its deadline of 100 ms",
      "error: Closing throws failed: async",
      "error: Closing throws failed: sync",
    ]);
  });

  it("waits for queued events and for handlers and guards under way before their plugin is closed", async (t) => {
    const seen: string[] = [];
    const gate = Promise.withResolvers<void>();
    const host = await startWith(t, [
      plugin("listener", {
        setup({ hooks, defer }) {
          defer(() => void seen.push("listener closed"));
          hooks.guard("test:guard", async () => {
            await gate.promise;
            seen.push("guard ended");
          });
          hooks.on("test:event", async (value) => {
            await gate.promise;
            seen.push(`event ${value} ended`);
          });
        },
      }),
      plugin("publisher", {
        setup({ hooks, defer }) {
          defer(() => hooks.publish("test:event", 2));
        },
      }),
    ]);
    const asked = host.hooks.ask("test:guard", { seen });
    host.hooks.publish("test:event", 1);
    const closed = host.close();
    await new Promise(setImmediate);
    assert.deepEqual(seen, []);
    gate.resolve();
    await Promise.all([closed, asked]);
    assert.deepEqual(seen.toSorted(), ["event 1 ended", "event 2 ended", "guard ended", "listener closed"]);
    assert.equal(seen.at(-1), "listener closed");
  });

  it("waits for a guard under way before its plugin is closed", async (t) => {
    const seen: string[] = [];
    const gate = Promise.withResolvers<void>();
    const guards = plugin("guards", {
      setup({ hooks, defer }) {
        defer(() => void seen.push("closed"));
        hooks.guard("test:guard", () => gate.promise.then(() => void seen.push("guard ended")));
      },
    });
    const host = await startWith(t, [guards]);
    const asked = host.hooks.ask("test:guard", { seen });
    const closed = host.close();
    await new Promise(setImmediate);
    gate.resolve();
    await Promise.all([closed, asked]);
    assert.deepEqual(seen, ["guard ended", "closed"]);
  });

  it("undoes every registration: no hook is called and no service is there afterwards", async (t) => {
    const seen: string[] = [];
    const host = await startWith(t, [
      plugin("a", {
        provides: ["first"],
        setup({ hooks, provide }) {
          provide("first", { name: "a" });
          hooks.guard("test:guard", () => void seen.push("guard"));
          hooks.commit("test:commit", () => void seen.push("commit"));
          hooks.on("test:event", () => void seen.push("event"));
        },
      }),
    ]);
    await host.close();
    host.hooks.publish("test:event", 1);
    host.hooks.apply("test:commit", { seen });
    await host.hooks.ask("test:guard", { seen });
    assert.deepEqual([seen, host.use("first")], [[], undefined]);
    assert.equal(host.hooks.stats().find(({ consumer }) => consumer === "a")?.subscribers, 0);
  });

  // What is under way when the host closes is concluded by those who began it, after plugins that build on them.
  it("calls commit hooks of plugins that have closed, until all have", async (t) => {
    const seen: string[] = [];
    const first = plugin("first", {
      setup: ({ hooks, defer }) => defer(() => hooks.apply("test:commit", { seen })),
    });
    const second = plugin("second", {
      setup({ hooks, defer }) {
        hooks.commit("test:commit", () => void seen.push("commit"));
        defer(() => void seen.push("second closed"));
      },
    });
    const host = await startWith(t, [first, second]);
    await host.close();
    assert.deepEqual(seen, ["second closed", "commit"]);
  });

  it("does not wait for ever when a handler never ends, and names its plugin", async (t) => {
    const logs = capturedLogs(t);
    const seen: string[] = [];
    const host = await startWith(t, [
      plugin("other", { setup: ({ defer }) => defer(() => void seen.push("other")) }),
      plugin("stuck", { setup: ({ hooks }) => void hooks.on("test:event", () => new Promise(() => {})) }),
    ], { host: { close_timeout: "10ms" } });
    host.hooks.publish("test:event", 1);
    await host.close();
    assert.deepEqual(seen, ["other"]);
    assert.deepEqual(logs, [
      "error: Closing the event queues failed: it ran past its deadline of 100 ms",
      "error: Closing stuck failed: it ran past its deadline of 100 ms",
    ]);
  });
});
