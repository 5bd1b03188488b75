import { join } from "node:path";
import { test } from "node:test";
import { lacking } from "../helpers.ts";
import { inOwnNetwork, lackingNetwork } from "../isolated.ts";

test("instances run in the network that was made for them", { skip: lacking(lackingNetwork()) }, async () => {
  await inOwnNetwork(join(import.meta.dirname!, "networked.ts"), { timeout: 540_000 });
});
