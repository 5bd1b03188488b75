import assert from "node:assert/strict";
import { chownSync, copyFileSync, linkSync, mkdirSync, realpathSync } from "node:fs";
import { chmod } from "node:fs/promises";
import { basename, join } from "node:path";
import process from "node:process";
import { test } from "node:test";
import { execa, execaSync } from "execa";
import { lacking, ROOT, temporaryFolder } from "../helpers.ts";
import { NEEDS_ROOT } from "./fixture.ts";

const NOBODY = ["--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"];

// Root is needed only to become somebody else; where the tests run without it, the files below have run like that.
test("everything but users, roots and cgroups works without root", {
  skip: lacking(NEEDS_ROOT),
  timeout: 600_000,
}, async (t) => {
  const folder = temporaryFolder(t);
  await chmod(folder, 0o777);
  const home = join(folder, "home");
  mkdirSync(home, { mode: 0o777 });
  await chmod(home, 0o777);
  // The runtime may be installed where only root can read it.
  const runtime = join(folder, basename(process.execPath));
  place(realpathSync(process.execPath), runtime);
  const setpriv = join(folder, "setpriv");
  copyFileSync(execaSync("sh", ["-c", "command -v setpriv"]).stdout, setpriv);
  // For those below alone.
  chownSync(setpriv, 0, 65534);
  await chmod(setpriv, 0o4750);
  const becomes = execaSync("setpriv", [...NOBODY, setpriv, "--reuid=0", "--", "id", "-u"], { reject: false });
  const flags = "Deno" in globalThis ? ["test", "-A", "--no-check", "--cached-only"] : ["--test"];
  const files = ["driver", "exec", "logs", "workload"].map((name) => join(ROOT, "test", "process", `${name}.test.ts`));
  const { exitCode, all } = await execa("setpriv", [...NOBODY, runtime, ...flags, ...files], {
    cwd: ROOT,
    extendEnv: false,
    // Without the variable by which Node's runner knows that it runs below another one.
    env: {
      PATH: process.env.PATH!,
      HOME: home,
      DENO_DIR: join(home, "deno"),
      NO_COLOR: "1",
      ...(becomes.stdout === "0" && { BECOME_ROOT: setpriv }),
    },
    reject: false,
    all: true,
    stdin: "ignore",
  });
  assert.equal(exitCode, 0, all);
});

function place(from: string, to: string): void {
  try {
    linkSync(from, to);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "EXDEV") throw error;
    copyFileSync(from, to);
  }
}
