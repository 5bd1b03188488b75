import assert from "node:assert/strict";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { it, type TestContext } from "node:test";
import * as v from "valibot";
import { DormouseError } from "../../main.ts";
import { check, Problems, readConfig } from "../../plugins/shared/config.ts";
import type { Schema } from "../../plugins/shared/contracts.ts";
import { duration } from "../../plugins/shared/schemas.ts";
import { temporaryFolder } from "../helpers.ts";

function read(t: TestContext, text: string, env: Record<string, string> = {}) {
  const folder = temporaryFolder(t);
  const file = join(folder, "config.toml");
  writeFileSync(file, text);
  const { config, problems } = readConfig(file, { env, dataDir: "/default/data" });
  const lines = problems.lines.map((line) => line.replace(`${file}: `, ""));
  return { folder, file, config, lines, problems };
}

it("readConfig() fills in what is absent", (t) => {
  const { config, lines } = read(t, "");
  assert.deepEqual(lines, []);
  assert.deepEqual(config, {
    dataDir: "/default/data",
    host: {
      event_buffer: 256,
      setup_timeout: 30_000,
      close_timeout: 30_000,
      guard_timeout: 10_000,
      log_level: "info",
      log_format: "auto",
    },
    plugins: [],
  });
});

it("readConfig() keeps the plugins that are on, in order, and makes paths absolute", (t) => {
  const { config, folder, lines } = read(
    t,
    `
    data_dir = "../state"
    [plugins.b]
    use = "./mine.ts"
    x = 1
    [plugins.off]
    enabled = false
    [plugins.a]
    enabled = true
    [plugins.up]
    use = "../up.ts"
    [plugins.absolute]
    use = "/opt/plugin.js"
    [plugins.package]
    use = "npm:some-plugin@1"
    [plugins.bare]
    use = "some-plugin"
    `,
  );
  assert.deepEqual(lines, []);
  assert.equal(config.dataDir, join(folder, "..", "state"));
  assert.deepEqual(structuredClone(config.plugins), [
    { name: "b", use: join(folder, "mine.ts"), options: { x: 1 } },
    { name: "a", options: {} },
    { name: "up", use: join(folder, "..", "up.ts"), options: {} },
    { name: "absolute", use: "/opt/plugin.js", options: {} },
    { name: "package", use: "npm:some-plugin@1", options: {} },
    { name: "bare", use: "some-plugin", options: {} },
  ]);
});

it("readConfig() tells every problem at once, with path, what was expected, what was found and the nearest key", (t) => {
  const { lines } = read(
    t,
    `
    data_dir = 5
    plugin = 1
    [host]
    event_bufer = 1
    event_buffer = 0
    setup_timeout = "soon"
    close_timeout = 30
    guard_timeout = "0s"
    log_level = "loud"
    [plugins]
    c = true
    [plugins.a]
    enabled = "no"
    use = 5
    [plugins."../main"]
    [plugins.constructor]
    [plugins.__proto__]
    [[plugins.list]]
    `,
  );
  assert.deepEqual(lines, [
    'plugin: unknown key (did you mean "plugins"?)',
    "data_dir: expected a path, found 5",
    'host.event_bufer: unknown key (did you mean "event_buffer"?)',
    "host.event_buffer: expected >=1, found 0",
    'host.setup_timeout: expected a duration such as "30s" above zero, found "soon"',
    'host.close_timeout: expected a duration such as "30s", found 30',
    'host.guard_timeout: expected a duration such as "30s" above zero, found "0s"',
    'host.log_level: expected ("trace" | "debug" | "info" | "warning" | "error" | "fatal"), found "loud"',
    "plugins.c: expected a table, found true",
    'plugins.a.enabled: expected true or false, found "no"',
    "plugins.a.use: expected a path or a package, found 5",
    'plugins."../main": expected a name that begins with a letter, of letters, digits, _ and -',
    'plugins."__proto__": expected a name that begins with a letter, of letters, digits, _ and -',
    "plugins.list: expected a table, found [{}]",
  ]);
  assert.deepEqual(read(t, "host = 1\nplugins = [1]").lines, [
    "host: expected Object, found 1",
    "plugins: expected tables [plugins.NAME], found [1]",
  ]);
  assert.deepEqual(read(t, "[host]\nevent_buffer = nan").lines, ["host.event_buffer: expected number, found NaN"]);
});

it("readConfig() throws with line and column when the file is not TOML", (t) => {
  const cases: [string, RegExp][] = [
    ["[host]\nlog_level = info\n", /config\.toml:2:16: /],
    ["a = 1\na = 2\n", /config\.toml:2:\d+: /],
    ["[plugins.api\n", /config\.toml:1:\d+: /],
    ["x = 99999999999999999999", /config\.toml:1:\d+: integer/],
    ["\u0000", /config\.toml:1:\d+: /],
  ];
  for (const [text, message] of cases) {
    assert.throws(() => read(t, text), (error: DormouseError) => {
      assert.equal(error.code, "config_invalid");
      assert.match(error.message, message, text);
      return true;
    });
  }
});

it("readConfig() throws with the path when the file cannot be read", (t) => {
  const folder = temporaryFolder(t);
  for (const file of [join(folder, "none.toml"), folder]) {
    assert.throws(() => readConfig(file, { env: {}, dataDir: "/d" }), (error: DormouseError) => {
      assert.equal(error.code, "config_invalid");
      assert.ok(error.message.startsWith(`${file}: cannot be read: `), error.message);
      return true;
    });
  }
});

it("readConfig() lays variables of the environment over the file", (t) => {
  const { config, lines } = read(t, '[host]\nlog_level = "info"\n[plugins.conntrack-standby]\nidle = "1m"', {
    DORMOUSE_DATA_DIR: "/var/lib/dormouse",
    DORMOUSE_HOST__LOG_LEVEL: "debug",
    DORMOUSE_HOST__EVENT_BUFFER: "64",
    DORMOUSE_PLUGINS__API__LISTEN: "127.0.0.1:9000",
    DORMOUSE_PLUGINS__API__TOKENS: '[{ token = "t", scopes = ["instance:read"] }]',
    DORMOUSE_PLUGINS__API__DEEP__KEY: "true",
    DORMOUSE_PLUGINS__API__TEXT: '"true"',
    DORMOUSE_PLUGINS__CONNTRACK_STANDBY__IDLE: "5m",
    DORMOUSE_PLUGINS__STORE__ENABLED: "false",
    DORMOUSE_E2E: "require",
    DORMOUSE_HOME: "/home",
    OTHER__X: "1",
  });
  assert.deepEqual(lines, []);
  assert.deepEqual([config.dataDir, config.host.log_level, config.host.event_buffer], [
    "/var/lib/dormouse",
    "debug",
    64,
  ]);
  assert.deepEqual(structuredClone(config.plugins), [
    { name: "conntrack-standby", options: { idle: "5m" } },
    {
      name: "api",
      options: {
        listen: "127.0.0.1:9000",
        tokens: [{ token: "t", scopes: ["instance:read"] }],
        deep: { key: true },
        text: "true",
      },
    },
  ]);
});

it("readConfig() names the variable in the place of the file when that is what is wrong", (t) => {
  const env = {
    DORMOUSE_HOST__LOG_LEVEL: "loud",
    DORMOUSE_HOSTS__X: "1",
    DORMOUSE_PLUGINS__: "1",
    DORMOUSE_PLUGINS__API: "1",
  };
  assert.deepEqual(
    read(t, "", env).lines.toSorted(),
    [
      'DORMOUSE_HOST__LOG_LEVEL: host.log_level: expected ("trace" | "debug" | "info" | "warning" | "error" | "fatal"), found "loud"',
      "DORMOUSE_HOSTS__X: expected DORMOUSE_DATA_DIR, DORMOUSE_HOST__KEY or DORMOUSE_PLUGINS__NAME__KEY",
      "DORMOUSE_PLUGINS__API: plugins.api: expected a table, found 1",
      "DORMOUSE_PLUGINS__: has an empty key",
    ].toSorted(),
  );
});

function problemsOf(schema: Schema, value: unknown): string[] {
  const problems = new Problems("f");
  const output = check(schema, value, "p", problems);
  if (problems.lines.length > 0) assert.equal(output, undefined);
  return problems.lines.map((line) => line.replace("f: ", ""));
}

it("check() tells what a Valibot schema expected, down to nested and unknown keys", () => {
  const token = v.object({ token: v.string(), scopes: v.optional(v.array(v.picklist(["read", "write"])), ["read"]) });
  const schema = v.object({
    listen: v.string(),
    idle: duration({ min: 1 }),
    port: v.pipe(v.number(), v.integer(), v.maxValue(65_535)),
    tokens: v.optional(v.array(token), []),
    pools: v.optional(v.record(v.string(), v.object({ size: v.number() })), {}),
    strict: v.optional(v.strictObject({ need: v.boolean() })),
  });
  assert.deepEqual(
    problemsOf(schema, { listen: "x", idle: "1s", port: 80, tokens: [{ token: "t" }], pools: { a: { size: 1 } } }),
    [],
  );
  assert.deepEqual(problemsOf(schema, {}), [
    "p.listen: missing, expected string",
    'p.idle: missing, expected a duration such as "30s"',
    "p.port: missing, expected number",
  ]);
  const bad = {
    listen: 1,
    idle: "1s",
    port: 1.5,
    tokens: [{ token: "t", scope: [] }, { scopes: ["admin"] }],
    pools: { a: { sise: 1 } },
    strict: { needs: true },
    lsten: "",
  };
  assert.deepEqual(problemsOf(schema, bad), [
    'p.tokens.0.scope: unknown key (did you mean "scopes"?)',
    'p.pools.a.sise: unknown key (did you mean "size"?)',
    'p.strict.needs: unknown key (did you mean "need"?)',
    'p.lsten: unknown key (did you mean "listen"?)',
    "p.listen: expected string, found 1",
    "p.port: Invalid integer, found 1.5",
    "p.tokens.1.token: missing, expected string",
    'p.tokens.1.scopes.0: expected ("read" | "write"), found "admin"',
    "p.pools.a.size: missing, expected number",
    "p.strict.need: missing, expected boolean",
  ]);
});

it("check() takes any Standard Schema, and refuses one that is asynchronous", () => {
  const standard = (validate: Schema["~standard"]["validate"]): Schema => ({
    "~standard": { version: 1, vendor: "test", validate },
  });
  const issues = [{ message: "must be even", path: ["size", { key: 0 }] }, { message: "is wrong" }];
  const problems = new Problems("f");
  assert.deepEqual(check(standard((value) => ({ value: { ...value as object, more: 1 } })), { x: 1 }, "p", problems), {
    x: 1,
    more: 1,
  });
  assert.deepEqual(problemsOf(standard(() => ({ issues })), {}), ["p.size.0: must be even", "p: is wrong"]);
  assert.deepEqual(problemsOf(standard(() => Promise.resolve({ value: 1 })), {}), ["p: its schema is asynchronous"]);
});

it("throwIfAny() keeps the code of a plugin that did not load only when it is the only problem", () => {
  const alone = new Problems("f");
  alone.throwIfAny();
  alone.include("x", new DormouseError("plugin_unknown", "No plugin"));
  assert.throws(() => alone.throwIfAny(), { code: "plugin_unknown", message: "f: plugins.x: No plugin" });
  alone.add("y", "wrong");
  assert.throws(() => alone.throwIfAny(), { code: "config_invalid", message: "f: plugins.x: No plugin\nf: y: wrong" });
  assert.throws(() => alone.include("x", new Error("a bug")), /a bug/);
});
