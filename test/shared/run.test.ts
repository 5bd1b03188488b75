import assert from "node:assert/strict";
import { test } from "node:test";
import { CommandError, run } from "../../plugins/shared/run.ts";

test("run() hands over stdin and returns stdout without its last newline", async () => {
  assert.equal(await run("cat", [], { input: "one\ntwo\n" }), "one\ntwo");
  assert.equal(await run("cat"), "", "without input, stdin is empty");
  assert.equal(await run("sh", ["-c", "echo $ADDED $LC_ALL"], { env: { ADDED: "more" } }), "more C");
  assert.equal(await run("true", [], { input: "x".repeat(1_000_000) }), "", "it need not read its stdin");
});

test("run() rejects with command, exit code and stderr when the command fails", async () => {
  const failures: [string, () => Promise<string>, Partial<CommandError>][] = [
    ["an exit code", () => run("sh", ["-c", "echo bad >&2; exit 3"]), {
      message: 'Command "sh -c echo bad >&2; exit 3" failed: exit code 3: bad',
      exitCode: 3,
      stderr: "bad",
    }],
    ["no such program", () => run("no-such-program", ["x"]), {
      message: 'Command "no-such-program x" failed: no such program',
      exitCode: null,
      code: "ENOENT",
    }],
    ["a signal", () => run("sh", ["-c", "kill -9 $$"]), {
      message: 'Command "sh -c kill -9 $$" failed: ended by SIGKILL',
    }],
    ["its deadline", () => run("sleep", ["60"], { timeout: 20 }), {
      message: 'Command "sleep 60" failed: it ran past its deadline',
    }],
    ["an abort", () => run("sleep", ["60"], { signal: AbortSignal.abort() }), {
      message: 'Command "sleep 60" failed: it was aborted',
    }],
  ];
  for (const [what, failing, expected] of failures) {
    await assert.rejects(failing, (error: unknown) => {
      assert.ok(error instanceof CommandError, what);
      for (const [key, value] of Object.entries(expected)) assert.equal(error[key as keyof CommandError], value, what);
      return true;
    });
  }
});
