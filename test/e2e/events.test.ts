import { join } from "node:path";
import { test } from "node:test";
import { lacking } from "../helpers.ts";
import { inOwnNetwork, lackingNetwork } from "../isolated.ts";

const what = "10,000 events of connections, many of them lost, put nobody to sleep who is in use";

test(what, { skip: lacking(lackingNetwork()) }, async (t) => {
  const all = await inOwnNetwork(join(import.meta.dirname!, "sleep-events.ts"), { timeout: 600_000 });
  for (const [seen] of all.matchAll(/^.*\bseen: .*$/gm)) t.diagnostic(seen);
});
