import assert from "node:assert/strict";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { it, type TestContext } from "node:test";
import { DormouseError, type ErrorCode, type Plugin } from "../../main.ts";
import { importPlugin, inOrder, neededFor } from "../../plugins/shared/modules.ts";
import { ROOT, temporaryFolder } from "../helpers.ts";

const FOLDER = join(ROOT, "plugins");

function refused(code: ErrorCode, message: RegExp) {
  return (error: unknown) => {
    assert.ok(error instanceof DormouseError, String(error));
    assert.equal(error.code, code, error.message);
    assert.match(error.message, message);
    return true;
  };
}

function module(t: TestContext, text: string): string {
  const file = join(temporaryFolder(t), "plugin.mjs");
  writeFileSync(file, text);
  return file;
}

it("importPlugin() loads a plugin of the project by its name", async () => {
  const { name, provides } = await importPlugin(FOLDER, "store", undefined);
  assert.deepEqual([name, provides], ["store", ["store"]]);
});

it("importPlugin() loads a plugin that imports nothing, under the config's name, also one of a class", async (t) => {
  const plain = `export default { name: "other", provides: ["x"], setup(host) { host.seen = this.name; } }`;
  const object = `class Mine { #own = "own"; get provides() { return ["x"]; } setup(host) { host.seen = this.#own; } }
    export default new Mine()`;
  for (const [text, expected] of [[plain, "other"], [object, "own"]]) {
    const plugin = await importPlugin(FOLDER, "mine", module(t, text));
    const host = { seen: "" };
    await plugin.setup(host as never, {});
    assert.deepEqual([plugin.name, plugin.provides, host.seen], ["mine", ["x"], expected]);
  }
});

it("importPlugin() says plugin_unknown when there is no module or it does not load", async (t) => {
  const cases: [string, string | undefined, RegExp][] = [
    ["stroe", undefined, /^No plugin "stroe" in .*plugins \(did you mean "store"\?\)$/],
    ["shared", undefined, /^No plugin "shared" in /],
    ["x", "/no/such/file.ts", /^Cannot load plugin "x" from \/no\/such\/file\.ts: /],
    ["x", "plugins/x.ts", /^Cannot load plugin "x" from plugins\/x\.ts \(a path starts with "\.\/"\): /],
    ["x", "no-such-package-of-anyone", /^Cannot load plugin "x" from no-such-package-of-anyone: /],
    ["x", module(t, "export default {"), /^Cannot load plugin "x" from .*plugin\.mjs: /],
    ["x", module(t, "throw new Error('boom')"), /^Cannot load plugin "x" from .*plugin\.mjs: boom$/],
  ];
  for (const [name, use, message] of cases) {
    await assert.rejects(importPlugin(FOLDER, name, use), refused("plugin_unknown", message));
  }
});

it("importPlugin() says plugin_invalid with what is wrong when the default export is not a plugin", async (t) => {
  const cases: [string, RegExp][] = [
    ["", /its default export is not an object$/],
    ["export default null", /its default export is not an object$/],
    ["export default () => {}", /its default export is not an object$/],
    ["export const setup = () => {}", /its default export is not an object$/],
    ["export default {}", /setup is not a function$/],
    ["export default { setup: 1 }", /setup is not a function$/],
    ["export default { setup() {}, options: {} }", /options is not a Standard Schema$/],
    ["export default { setup() {}, requires: 'store' }", /requires is not a list of names$/],
    ["export default { setup() {}, provides: [1] }", /provides is not a list of names$/],
    ["export default { setup() {}, commands: { x() {} } }", /commands\.x lacks help or run$/],
    ["export default { setup() {}, commands: { x: null } }", /commands\.x lacks help or run$/],
    ["export default { setup() {}, commands: 5 }", /commands is not a table$/],
    [
      "export default { setup() {}, commands: { check: { help: '', run() {} } } }",
      /commands\.check is the host's own$/,
    ],
  ];
  for (const [text, message] of cases) {
    await assert.rejects(importPlugin(FOLDER, "x", module(t, text)), refused("plugin_invalid", message), text);
  }
});

it("importPlugin() refuses a plugin of the project when its name is another", async (t) => {
  const folder = temporaryFolder(t);
  writeFileSync(join(folder, "mine.ts"), `export default { name: "yours", setup() {} }`);
  await assert.rejects(importPlugin(folder, "mine", undefined), refused("plugin_invalid", /its name is "yours"$/));
});

function loaded(...plugins: [name: string, requires: string[], provides: string[], command?: string][]) {
  return plugins.map(([name, requires, provides, command]) => ({
    plugin: {
      name,
      requires,
      provides,
      setup() {},
      ...(command && { commands: { [command]: { help: "", run() {} } } }),
    } as unknown as Plugin,
  }));
}
const names = (list: { plugin: Plugin }[]) => list.map(({ plugin }) => plugin.name).join(" ");

it("inOrder() puts each plugin after those it requires, and else leaves the order", () => {
  assert.equal(names(inOrder(loaded(["a", [], []], ["b", [], []], ["c", [], []]))), "a b c");
  assert.equal(names(inOrder(loaded(["a", ["y"], []], ["b", ["x"], ["y"]], ["c", [], ["x"]]))), "c b a");
  assert.equal(names(inOrder(loaded(["a", ["x?"], []], ["b", [], ["x"]]))), "b a");
  assert.equal(names(inOrder(loaded(["a", ["x?"], []], ["b", [], []]))), "a b");
  assert.equal(names(inOrder([])), "");
});

it("inOrder() refuses what is missing, circular or there twice, by name", () => {
  const cases: [ReturnType<typeof loaded>, ErrorCode, RegExp][] = [
    [
      loaded(["api", ["hypervizor"], []], ["h", [], ["hypervisor"]]),
      "plugin_missing",
      /^Plugin "api" requires "hypervizor", which no plugin that is turned on provides \(did you mean "hypervisor"\?\)$/,
    ],
    [
      loaded(["a", ["x"], []]),
      "plugin_missing",
      /^Plugin "a" requires "x", which no plugin that is turned on provides$/,
    ],
    [
      loaded(["lead", ["x"], []], ["a", ["y"], ["x"]], ["b", ["x"], ["y"]]),
      "plugin_cycle",
      /^Plugins require each other: a -> b -> a$/,
    ],
    [loaded(["a", ["x"], ["x"]]), "plugin_cycle", /^Plugins require each other: a -> a$/],
    [loaded(["a", [], ["x"]], ["b", [], ["x"]]), "plugin_duplicate", /^Plugins "a" and "b" both provide "x"$/],
    [
      loaded(["a", [], [], "c"], ["b", [], [], "c"]),
      "plugin_duplicate",
      /^Plugins "a" and "b" both have the command --c$/,
    ],
  ];
  for (const [plugins, code, message] of cases) assert.throws(() => inOrder(plugins), refused(code, message));
});

it("neededFor() keeps what the command's plugin requires, directly or not, in order", () => {
  const all = inOrder(
    loaded(["log", [], []], ["store", [], ["s"]], ["registry", ["s"], ["r"]], ["net", ["r", "m?"], [], "purge"], [
      "api",
      ["r"],
      [],
    ]),
  );
  assert.equal(names(neededFor(all, "purge")), "store registry net");
  assert.equal(names(neededFor(all, "other")), "");
  Object.assign(all.find(({ plugin }) => plugin.name === "net")!.plugin.commands!.purge, { alone: true });
  assert.equal(names(neededFor(all, "purge")), "net");
});
