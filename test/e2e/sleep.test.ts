import { join } from "node:path";
import { test } from "node:test";
import { lacking } from "../helpers.ts";
import { inOwnNetwork, lackingNetwork } from "../isolated.ts";

const what = "an instance sleeps when nobody is connected and wakes for the next, whatever becomes of the host";

test(what, { skip: lacking(lackingNetwork()) }, async (t) => {
  const all = await inOwnNetwork(join(import.meta.dirname!, "sleep-host.ts"), { timeout: 600_000 });
  for (const [seen] of all.matchAll(/^.*\bseen: .*$/gm)) t.diagnostic(seen);
});
