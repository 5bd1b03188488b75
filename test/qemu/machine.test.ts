import { join } from "node:path";
import { test } from "node:test";
import { lacking } from "../helpers.ts";
import { inOwnNetwork, lackingNetwork } from "../isolated.ts";
import { demoImage, skipGuest } from "./guest.ts";

const skip = skipGuest || lacking(lackingNetwork("setpriv", "qemu-img"));

test("machines answer, sleep, wake and outlive their host", { skip, timeout: 900_000 }, async (t) => {
  const env = { DORMOUSE_TEST_IMAGE: await demoImage() };
  const all = await inOwnNetwork(join(import.meta.dirname!, "machine-host.ts"), { timeout: 840_000, env });
  for (const [seen] of all.matchAll(/^.*\bseen: .*$/gm)) t.diagnostic(seen);
});
