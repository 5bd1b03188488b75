import { join } from "node:path";
import { test } from "node:test";
import { lacking } from "../helpers.ts";
import { inOwnNetwork, lackingNetwork } from "../isolated.ts";
import { demoImage, skipGuest } from "./guest.ts";

const skip = skipGuest || lacking(lackingNetwork("setpriv", "qemu-img", "curl"));

test("what README.md shows of machines works as printed", { skip, timeout: 840_000 }, async (t) => {
  const env = { DORMOUSE_TEST_IMAGE: await demoImage() };
  const all = await inOwnNetwork(join(import.meta.dirname!, "readme-host.ts"), { timeout: 600_000, env });
  for (const [seen] of all.matchAll(/^.*\bseen: .*$/gm)) t.diagnostic(seen);
});
