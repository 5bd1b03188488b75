import assert from "node:assert/strict";
import { readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, it } from "node:test";
import { parse } from "smol-toml";
import qemu from "../../plugins/qemu/mod.ts";
import { ROOT, runMain, temporaryFolder } from "../helpers.ts";

const FOLDER = join(ROOT, "config");
/** With all that is shown and commented out. */
const whole = (text: string) => text.replace(/^# (?=\w+ = |\[\[)/gm, "");

for (const name of readdirSync(FOLDER).filter((each) => each.endsWith(".toml"))) {
  const file = join(FOLDER, name);
  const text = readFileSync(file, "utf8");

  describe(`config/${name}`, () => {
    it("passes --check, as it is and with all that it shows", async (t) => {
      const plain = await runMain(t, ["--config", file, "--check"]);
      assert.deepEqual([plain.exitCode, plain.stderr], [0, ""]);
      const copy = join(temporaryFolder(t), name);
      writeFileSync(copy, whole(text));
      const all = await runMain(t, ["--config", copy, "--check"]);
      assert.deepEqual([all.exitCode, all.stderr], [0, ""]);
    });
  });
}

it("config/vm-host.toml shows every option of the plugin qemu", () => {
  const { plugins } = parse(whole(readFileSync(join(FOLDER, "vm-host.toml"), "utf8")));
  const options = qemu.options as unknown as { entries: Record<string, unknown> };
  const { qemu: shown } = plugins as Record<string, Record<string, unknown>>;
  assert.deepEqual(Object.keys(shown).toSorted(), Object.keys(options.entries).toSorted());
});
