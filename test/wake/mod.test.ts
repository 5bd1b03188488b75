import { join } from "node:path";
import { test } from "node:test";
import { lacking } from "../helpers.ts";
import { inOwnNetwork, lackingNetwork } from "../isolated.ts";

const skip = lacking(lackingNetwork("bash"));

test("instances are woken by the connections that the kernel sees or forwards", { skip }, async () => {
  await inOwnNetwork(join(import.meta.dirname!, "kernel.ts"), { timeout: 600_000 });
});
