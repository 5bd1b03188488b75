import { join } from "node:path";
import { test } from "node:test";
import { lacking } from "../helpers.ts";
import { inOwnNetwork, lackingNetwork } from "../isolated.ts";

const skip = lacking(lackingNetwork());

test("the metrics tell of a host with every plugin on, in a network of its own", { skip }, async () => {
  await inOwnNetwork(join(import.meta.dirname!, "live.ts"), { timeout: 540_000 });
});
