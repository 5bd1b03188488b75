import assert from "node:assert/strict";
import { it } from "node:test";
import * as v from "valibot";
import { definePlugin, HookBus, type Host, type LifecycleEvent, type Plugin, type Services } from "../../main.ts";
import "./vocabulary.ts";

// Checked by `deno check` and `tsc`, which fail where a line below an @ts-expect-error has no error. Nothing here runs.

function hooks(host: Host): void {
  const { hooks } = host;
  hooks.on("instance:event", (event) => void (event satisfies LifecycleEvent));
  hooks.on("instance:event", async ({ seq }) => void seq.toFixed());
  hooks.on("test:event", (value) => void value.toFixed(), {
    consumer: "c",
    buffer: 8,
    lagged: ({ from, to }) => void (to - from),
  });
  hooks.guard("before:standby", ({ instance, signal }) => void [instance.id, signal.aborted], {
    priority: 1,
    timeout: 5,
  });
  hooks.commit("instance:commit", ({ before, after }) => void [before?.id, after?.id], { priority: 1 });
  using _undo = hooks.on("test:event", () => {});

  // @ts-expect-error a name that is not in the vocabulary
  hooks.on("instance:evnt", () => {});
  // @ts-expect-error a guard is not an event
  hooks.on("before:standby", () => {});
  // @ts-expect-error an event is not a guard
  hooks.guard("instance:event", () => {});
  // @ts-expect-error a guard is not a commit hook
  hooks.commit("before:start", () => {});
  // @ts-expect-error the payload has no such field
  hooks.on("instance:event", ({ sequence }) => void sequence);
  // @ts-expect-error the payload is a number
  hooks.on("test:event", (value: string) => void value);
  // @ts-expect-error the payload of a guard may not be changed
  hooks.guard("before:start", (context) => void (context.instance = {} as Instance));
  // @ts-expect-error an instance is never changed in place
  hooks.commit("instance:commit", ({ after }) => void (after!.name = "x"));
  // @ts-expect-error an option of guards
  hooks.on("test:event", () => {}, { priority: 1 });
  // @ts-expect-error an option of events
  hooks.guard("before:start", () => {}, { buffer: 1 });
  // @ts-expect-error a commit hook has no deadline: it is synchronous
  hooks.commit("instance:commit", () => {}, { timeout: 1 });
  // @ts-expect-error the wrong type of an option
  hooks.guard("before:start", () => {}, { priority: "high" });

  hooks.publish("test:event", 1);
  // @ts-expect-error the wrong payload
  hooks.publish("test:event", "1");
  // @ts-expect-error an incomplete payload
  hooks.publish("instance:event", { seq: 1 });
  // @ts-expect-error a guard is asked, not published
  hooks.publish("test:guard", { seen: [] });
  // @ts-expect-error an event cannot be asked
  void hooks.ask("test:event", 1);
  // @ts-expect-error an event cannot be applied
  hooks.apply("test:event", 1);
}

function services(host: Host): void {
  host.use("store").db satisfies Services["store"]["db"];
  host.find("network")?.subnet satisfies string | undefined;
  host.provide("first", { name: "x" });
  // @ts-expect-error a service that is not in the vocabulary
  host.use("stroe");
  // @ts-expect-error the question mark belongs to `requires`
  host.find("network?");
  // @ts-expect-error find() may have nothing
  host.find("network").subnet;
  // @ts-expect-error an implementation that lacks what the service has
  host.provide("first", {});
  // @ts-expect-error a code that is not in the table
  host.error("no_such_code", "x");
}

function plugins(): Plugin[] {
  return [
    definePlugin({
      name: "typed",
      requires: ["store", "network?"],
      provides: ["first"],
      options: v.object({ listen: v.optional(v.string(), ":0"), idle: v.pipe(v.string(), v.transform(Number)) }),
      commands: { purge: { help: "x", run: (_host, { idle }) => void idle.toFixed() } },
      setup(host, options) {
        options satisfies { listen: string; idle: number };
        host.log.info("x");
        // @ts-expect-error an option that the schema lacks
        options.lisen;
      },
    }),
    // @ts-expect-error a required service that is not in the vocabulary
    definePlugin({ name: "x", requires: ["stroe"], setup() {} }),
    // @ts-expect-error a provided service may not be optional
    definePlugin({ name: "x", provides: ["store?"], setup() {} }),
    // @ts-expect-error no setup
    definePlugin({ name: "x" }),
    // @ts-expect-error no name
    definePlugin({ setup() {} }),
    // @ts-expect-error options is a schema
    definePlugin({ name: "x", options: { listen: "string" }, setup() {} }),
  ];
}

it("the vocabulary is typed for authors of plugins", () => {
  assert.ok([hooks, services, plugins, HookBus].every((each) => typeof each === "function"));
});
