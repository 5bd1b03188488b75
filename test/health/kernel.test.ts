import { join } from "node:path";
import { test } from "node:test";
import { lacking } from "../helpers.ts";
import { inOwnNetwork, lackingNetwork } from "../isolated.ts";

const skip = lacking(lackingNetwork("ss"));

// I16.
test("probes of real processes keep nobody awake and wake nobody", { skip }, async () => {
  await inOwnNetwork(join(import.meta.dirname!, "kernel.ts"), { timeout: 540_000 });
});
