import assert from "node:assert/strict";
import { existsSync, mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";
import { execa } from "execa";
import { readIfThere, removeFolder } from "../../plugins/shared/files.ts";
import { temporaryFolder } from "../helpers.ts";

test("readIfThere() reads what is there, and says where nothing is", (t) => {
  const folder = temporaryFolder(t);
  writeFileSync(join(folder, "file"), "größer\n");
  assert.equal(readIfThere(join(folder, "file")), "größer\n");
  assert.equal(readIfThere(join(folder, "none")), undefined);
  assert.equal(readIfThere(`/proc/${2 ** 22 + 1}/stat`), undefined);
  assert.throws(() => readIfThere(folder), { code: "EISDIR" });
});

test("removeFolder() removes also what is made while it does", async (t) => {
  for (let round = 0; round < 20; round++) {
    const folder = join(temporaryFolder(t), "folder");
    mkdirSync(join(folder, "inner"), { recursive: true });
    for (let i = 0; i < 200; i++) writeFileSync(join(folder, "inner", `${i}`), "");
    // It goes on for as long as there is a folder, and for a moment at most.
    const script = `for i in $(seq 300); do : >${folder}/new$i || exit 0; done 2>/dev/null`;
    const writer = execa("sh", ["-c", script], { reject: false });
    await removeFolder(folder);
    await writer;
    assert.ok(!existsSync(folder));
  }
  await removeFolder("/no/such/folder");
});
