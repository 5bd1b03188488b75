/** A host for webhooks-crash.test.ts to kill: writes events about its instances as long as it lives, or none. */
import process from "node:process";
import { definePlugin, loadPlugins, type Plugin, startHost } from "../../main.ts";
import { readConfig } from "../../plugins/shared/config.ts";
import { ORIGIN, ScriptedDriver } from "../hypervisor/scripted.ts";
import { noting } from "./webhook-world.ts";

async function main(file: string, mode: string): Promise<void> {
  const { config } = readConfig(file, { env: {}, dataDir: "" });
  const scripted = definePlugin({
    name: "scripted",
    requires: ["hypervisor"],
    setup: (host) => void host.use("hypervisor").register(new ScriptedDriver()),
  }) as Plugin;
  const given = new Map([["scripted", scripted], ["noting", noting]]);
  const host = await startHost(config, await loadPlugins(config, { given }));
  const hypervisor = host.use("hypervisor");
  for (const name of ["a", "b", "c"]) {
    if (!hypervisor.list().some((each) => each.name === name)) await hypervisor.create({ name, image: "any" }, ORIGIN);
  }
  const ids = hypervisor.list().map(({ id }) => id);
  const draft = { type: "test:noted", origin: ORIGIN, summary: "As the test says" };
  for (let i = 0; mode === "write" && i < 50_000; i++) {
    hypervisor.note(ids[i % ids.length], draft);
    await new Promise((resolve) => setTimeout(resolve, 1));
  }
  await new Promise((resolve) => setTimeout(resolve, 60_000));
}

void main(process.argv[2], process.argv[3]);
