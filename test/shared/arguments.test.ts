import assert from "node:assert/strict";
import { it } from "node:test";
import { commandHelp, readArguments, refuseUnknown } from "../../plugins/shared/arguments.ts";

const NONE = { file: undefined, check: false, help: false, version: false, command: undefined };

it("readArguments() reads flags in any order", () => {
  assert.deepEqual(readArguments([]), NONE);
  assert.deepEqual(readArguments(["--config", "a.toml", "--check"]), { ...NONE, file: "a.toml", check: true });
  assert.deepEqual(readArguments(["--purge", "--config=a.toml"]), { ...NONE, file: "a.toml", command: "purge" });
  assert.deepEqual(readArguments(["--help", "--version"]), { ...NONE, help: true, version: true });
});

it("readArguments() names the argument that cannot be used", () => {
  const cases: [string[], string][] = [
    [["--config"], 'Cannot use argument "--config": it needs a file, see --help'],
    [["--config="], 'Cannot use argument "--config": it needs a file, see --help'],
    [["--check=no"], 'Cannot use argument "--check=no": it takes no value, see --help'],
    [["--purge=all"], 'Cannot use argument "--purge=all": it takes no value, see --help'],
    [["check"], 'Cannot use argument "check" (did you mean "--check"?), see --help'],
    [["my.toml"], 'Cannot use argument "my.toml", see --help'],
    [["--", "--check"], 'Cannot use argument "--check" (did you mean "--check"?), see --help'],
    [["--one", "--two"], 'Cannot use argument "--two": there is --one already, see --help'],
  ];
  for (const [argv, message] of cases) assert.throws(() => readArguments(argv), { code: "invalid_request", message });
});

it("refuseUnknown() knows the commands of the plugins", () => {
  refuseUnknown(undefined, []);
  refuseUnknown("purge", ["purge"]);
  const message = 'Cannot use argument "--prge" (did you mean "--purge"?), see --help';
  assert.throws(() => refuseUnknown("prge", ["purge"]), { code: "invalid_request", message });
});

it("commandHelp() has a line for each command", () => {
  assert.equal(commandHelp({}), "");
  assert.match(commandHelp({ purge: { help: "removes it" } }), /\n {2}--purge +removes it$/);
});
