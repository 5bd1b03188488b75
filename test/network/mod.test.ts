import { existsSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";
import { lacking } from "../helpers.ts";
import { inOwnNetwork, lackingNetwork } from "../isolated.ts";

const lacks = lackingNetwork("setpriv", "ping", "bash");
const skip = lacking(lacks);
const skip6 = lacking(lacks ?? (existsSync("/proc/sys/net/ipv6") ? null : "the kernel has no IPv6"));

/** The machine's own network and names of namespaces are never touched. */
const inside = async (file: string) => void await inOwnNetwork(join(import.meta.dirname!, file), { timeout: 540_000 });

test("the network connects instances with the host, each other and the world", { skip }, () => inside("traffic.ts"));
test("the network does the same over IPv6", { skip: skip6 }, () => inside("traffic6.ts"));
test("the network repairs, reconciles, refuses and leaves no trace", { skip }, () => inside("upkeep.ts"));
test("the network says why it is off where it cannot work", { skip }, () => inside("off.ts"));
