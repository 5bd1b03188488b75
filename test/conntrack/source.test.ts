import { join } from "node:path";
import { test } from "node:test";
import { lacking } from "../helpers.ts";
import { inOwnNetwork, lackingNetwork } from "../isolated.ts";

const skip = lacking(lackingNetwork("setpriv", "bash"));

// The conntrack table there holds only what the tests do.
test("the sources tell what the kernel does, and come back from whatever ends them", { skip }, async () => {
  await inOwnNetwork(join(import.meta.dirname!, "kernel.ts"), { timeout: 540_000 });
});
