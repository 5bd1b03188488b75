import assert from "node:assert/strict";
import { once } from "node:events";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";
import type { Plugin } from "../../main.ts";
import hypervisorPlugin from "../../plugins/hypervisor/mod.ts";
import processPlugin from "../../plugins/process/mod.ts";
import storePlugin from "../../plugins/store.ts";
import { cleanup, freePort, RUNTIME, startWith, temporaryFolder, until } from "../helpers.ts";
import { ORIGIN } from "../hypervisor/scripted.ts";
import { open, talk } from "./world.ts";

const ECHO = `
import { createServer } from "node:net";
import process from "node:process";
createServer({ allowHalfOpen: true }, (socket) => socket.on("error", () => {}).pipe(socket)).listen(Number(process.argv[2]), "127.0.0.1");
`;

// R9: there is nobody to say goodbye to, for a frozen process keeps its connections, and what is said to it meanwhile.
test("an open connection goes on after a process slept and was woken by hand", async (t) => {
  const folder = temporaryFolder(t);
  const program = join(folder, "echo.mjs");
  writeFileSync(program, ECHO);
  const plugins = [storePlugin, hypervisorPlugin, processPlugin] as Plugin[];
  const tables = { process: { cgroup_parent: "", grace: "100ms" } };
  const hypervisor = (await startWith(t, plugins, { folder, tables })).use("hypervisor");
  const port = await freePort();
  const cmd = [...RUNTIME, program, String(port)];
  const { id } = await hypervisor.create({ name: "echo", image: "host", cmd }, ORIGIN);
  cleanup(t).defer(() => hypervisor.delete(id, ORIGIN));
  await until("it listens", async () => await talk(port, "up") === "up");
  const client = await open(t, port);
  let text = "";
  client.on("data", (chunk) => text += chunk);
  client.write("before, ");
  await until("it answers", () => text === "before, ");
  assert.equal((await hypervisor.standby(id, ORIGIN)).state, "Standby");
  await new Promise<void>((resolve) => client.write("asleep, ", () => resolve()));
  assert.equal(text, "before, ");
  assert.equal((await hypervisor.restore(id, ORIGIN)).state, "Running");
  client.end("after");
  await once(client, "end");
  assert.equal(text, "before, asleep, after");
});
