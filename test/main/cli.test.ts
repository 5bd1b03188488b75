import assert from "node:assert/strict";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { describe, it, type TestContext } from "node:test";
import { VERSION } from "../../main.ts";
import { runMain, temporaryFolder } from "../helpers.ts";

/** A config and plugins that import nothing, all in a folder of their own. */
function project(t: TestContext, plugins: Record<string, string>, host = ""): string {
  const folder = temporaryFolder(t);
  const tables = Object.keys(plugins).map((name) => `[plugins.${name}]\nuse = "./${name}.mjs"\n`);
  for (const [name, text] of Object.entries(plugins)) writeFileSync(join(folder, `${name}.mjs`), text);
  const file = join(folder, "config.toml");
  writeFileSync(file, `data_dir = "data"\n[host]\n${host}\n${tables.join("")}`);
  return file;
}

/** Resolves at a line of stdout, so that a test acts on what the process says and not on time. */
function says(child: ReturnType<typeof runMain>, wanted: string): Promise<void> {
  return new Promise((resolve, reject) => {
    let text = "";
    child.stdout!.on("data", (chunk) => (text += chunk).split("\n").includes(wanted) && resolve());
    void child.then(({ stderr }) => reject(new Error(`It ended without "${wanted}" but with ${text}${stderr}`)));
  });
}

const SAYS_READY = `export default {
  setup(host) {
    host.defer(() => console.log("closed, aborted " + host.signal.aborted));
    host.hooks.guard("host:ready", () => console.log("ready"));
    const timer = setInterval(() => {}, 1000);
    host.defer(() => clearInterval(timer));
  },
}`;

describe("main() checks and tells", () => {
  it("--version prints the version when there is no config", async (t) => {
    const { exitCode, stdout } = await runMain(t, ["--version", "--config", "/no/such"]);
    assert.deepEqual([exitCode, stdout], [0, VERSION]);
  });

  it("--help prints the usage and the commands of the config's plugins, the usage also when the config is wrong", async (t) => {
    const command = `export default { commands: { sweep: { help: "sweeps up", run() {} } }, setup() {} }`;
    const good = await runMain(t, ["--help", "--config", project(t, { sweeper: command })]);
    assert.equal(good.exitCode, 0);
    assert.match(good.stdout, /--config FILE[^]*--check[^]*--sweep +sweeps up/);
    const bad = await runMain(t, ["--help", "--config", "/no/such"]);
    assert.equal(bad.exitCode, 1);
    assert.match(bad.stdout, /--config FILE/);
    assert.match(bad.stderr, /^dormouse: config_invalid\n\/no\/such: cannot be read: /);
  });

  it("--check says what is on, starts nothing, and writes nothing", async (t) => {
    const file = project(t, {
      b: `export default { requires: ["x"], setup() { console.log("set up") } }`,
      a: `export default {
      provides: ["x"], setup() { console.log("set up") } }`,
    });
    const { exitCode, stdout, stderr } = await runMain(t, ["--check", "--config", file]);
    assert.deepEqual([exitCode, stdout, stderr], [0, `${file}: ok, plugins a, b`, ""]);
  });

  it("--check tells all problems of host, plugins and modules at once", async (t) => {
    // The schema is one that no library made: any Standard Schema serves.
    const strict =
      `const validate = (value) => "size" in value ? { value } : { issues: [{ message: "no size", path: ["size"] }] };
      export default { options: { "~standard": { version: 1, vendor: "own", validate } }, setup() {} }`;
    const file = project(
      t,
      { strict, broken: "export default 5", plain: "export default { setup() {} }" },
      "log_levle = 'info'",
    );
    const { exitCode, stdout, stderr } = await runMain(t, ["--check", "--config", file], {
      DORMOUSE_PLUGINS__PLAIN__COLOUR: "red",
      DORMOUSE_PLUGINS__STROE__ENABLED: "true",
    });
    assert.deepEqual([exitCode, stdout], [1, ""]);
    const lines = stderr.split("\n");
    assert.equal(lines.shift(), "dormouse: config_invalid");
    assert.equal(lines.length, 5);
    assert.equal(lines[0], `${file}: host.log_levle: unknown key (did you mean "log_level"?)`);
    assert.equal(lines[1], `${file}: plugins.strict.size: no size`);
    assert.match(lines[2], /: plugins\.broken: Plugin "broken" of .*broken\.mjs: its default export is not an object$/);
    assert.equal(lines[3], "DORMOUSE_PLUGINS__PLAIN__COLOUR: plugins.plain.colour: unknown key");
    assert.match(lines[4], /: plugins\.stroe: No plugin "stroe" in .* \(did you mean "store"\?\)$/);
  });

  it("an argument that nobody knows ends with 1 and a hint", async (t) => {
    const { exitCode, stderr } = await runMain(t, ["--chekc", "--config", project(t, {})]);
    const message = 'dormouse: invalid_request\nCannot use argument "--chekc" (did you mean "--check"?), see --help';
    assert.deepEqual([exitCode, stderr], [1, message]);
  });

  it("a start that fails ends with 1 and one plain message, after what was up is closed", async (t) => {
    const first =
      `export default { provides: ["x"], setup(host) { host.provide("x", {}); host.defer(() => console.log("closed")) } }`;
    const failing =
      `export default { requires: ["x"], setup(host) { throw host.error("subnet_overlap", "Subnet is taken") } }`;
    const { exitCode, stdout, stderr } = await runMain(t, ["--config", project(t, { failing, first })]);
    const message = 'dormouse: subnet_overlap\nCannot set up plugin "failing": Subnet is taken';
    assert.deepEqual([exitCode, stdout, stderr], [1, "closed", message]);
  });

  it("a mistake in a plugin's own code is told with its place", async (t) => {
    const cases: [string, RegExp][] = [
      ["nothing.at.all()", /: nothing is not defined$/],
      ["fs.readFileSync(undefined)", /: The "path" argument must be /],
      ['host.use("none")', /: Plugin "failing" uses "none" without requiring it$/],
    ];
    for (const [mistake, expected] of cases) {
      const failing = `import fs from "node:fs"; export default { setup(host) {\n  void fs, ${mistake};\n} }`;
      const { exitCode, stderr } = await runMain(t, ["--config", project(t, { failing })]);
      const [code, message, place, ...more] = stderr.split("\n");
      assert.deepEqual([exitCode, code, more], [1, "dormouse: plugin_failed", []], stderr);
      assert.match(message, expected);
      assert.match(place, /^ {4}at .*\/failing\.[a-z]+:2:\d+\)?$/);
    }
  });
});

describe("main() runs", () => {
  it("--COMMAND sets up only what the plugin requires, runs it, closes, and exits 0", async (t) => {
    const plugins = {
      needed:
        `export default { provides: ["x"], setup(host) { host.provide("x", "x of needed"); host.defer(() => console.log("closed")) } }`,
      idle: `export default { setup() { console.log("idle is set up") } }`,
      sweeper: `export default { requires: ["x"], setup() { console.log("sweeper is set up") },
        commands: { sweep: { help: "", async run(host) { console.log("sweeps with " + host.use("x")) } },
                    fail: { help: "", run() { throw new Error("no broom") } },
                    beside: { help: "", alone: true, run() { console.log("sweeps beside a host") } } } }`,
    };
    const file = project(t, plugins);
    const good = await runMain(t, ["--sweep", "--config", file]);
    assert.deepEqual([good.exitCode, good.stdout, good.stderr], [0, "sweeps with x of needed\nclosed", ""]);
    const alone = await runMain(t, ["--beside", "--config", file]);
    assert.deepEqual([alone.exitCode, alone.stdout, alone.stderr], [0, "sweeps beside a host", ""]);
    const bad = await runMain(t, ["--fail", "--config", file]);
    const message = 'dormouse: plugin_failed\nCannot run --fail of plugin "sweeper": no broom';
    assert.deepEqual([bad.exitCode, bad.stdout, bad.stderr], [1, "closed", message]);
  });

  for (const signal of ["SIGTERM", "SIGINT"] as const) {
    it(`${signal} closes the plugins and exits 0`, async (t) => {
      const child = runMain(t, ["--config", project(t, { one: SAYS_READY })]);
      await says(child, "ready");
      process.kill(child.pid!, signal);
      const { exitCode, stdout, stderr } = await child;
      assert.deepEqual([exitCode, stdout], [0, "ready\nclosed, aborted true"], stderr);
      const { message, logger } = JSON.parse(stderr);
      assert.deepEqual([message, logger], [`Closing on "${signal}"; instances go on running`, "dormouse.host"]);
    });
  }

  // execa ends the process by the signal where it finds that nobody else listens to it.
  it("a signal closes the plugins where one of them runs a child", async (t) => {
    const parent = `import { execa } from ${JSON.stringify(import.meta.resolve("execa"))};
    export default { setup(host) {
      const child = execa("sleep", ["600"], { reject: false });
      host.defer(async () => { child.kill(); await child; console.log("closed"); });
      host.hooks.guard("host:ready", () => console.log("ready"));
    } }`;
    const child = runMain(t, ["--config", project(t, { parent })]);
    await says(child, "ready");
    process.kill(child.pid!, "SIGTERM");
    const { exitCode, stdout, stderr } = await child;
    assert.deepEqual([exitCode, stdout], [0, "ready\nclosed"], stderr);
  });

  it("a second signal exits at once when a closer hangs", async (t) => {
    const hangs = `export default { setup(host) {
      host.defer(() => { console.log("closing"); return new Promise((resolve) => setTimeout(resolve, 600_000)); });
      host.hooks.guard("host:ready", () => { setInterval(() => {}, 1000); console.log("ready"); });
    } }`;
    const child = runMain(t, ["--config", project(t, { hangs }, 'close_timeout = "10m"')]);
    await says(child, "ready");
    process.kill(child.pid!, "SIGTERM");
    await says(child, "closing");
    process.kill(child.pid!, "SIGTERM");
    assert.equal((await child).exitCode, 130);
  });

  it("a signal in the middle of the start-up closes what is up once it is done", async (t) => {
    const slow = `export default { setup(host) {
      host.defer(() => console.log("closed"));
      const told = new Promise((resolve) => process.once("SIGTERM", resolve));
      console.log("in setup");
      return told;
    } }`;
    const child = runMain(t, ["--config", project(t, { slow })]);
    await says(child, "in setup");
    process.kill(child.pid!, "SIGTERM");
    const { exitCode, stdout } = await child;
    assert.deepEqual([exitCode, stdout], [0, "in setup\nclosed"]);
  });
});
