/** A host that kills itself (SIGKILL) in the middle of a creation: `crash.ts FOLDER create|start`. */
import { join } from "node:path";
import process from "node:process";
import { definePlugin, loadPlugins, type Plugin, startHost } from "../../main.ts";
import api from "../../plugins/api/mod.ts";
import hypervisor from "../../plugins/hypervisor/mod.ts";
import { HOST_DEFAULTS } from "../../plugins/shared/config.ts";
import store from "../../plugins/store.ts";
import { ScriptedDriver } from "../hypervisor/scripted.ts";

const [folder, point] = process.argv.slice(2);

const dying = definePlugin({
  name: "dying",
  requires: ["hypervisor", "api"],
  setup(host) {
    const driver = new ScriptedDriver();
    const die = () => void process.kill(process.pid, "SIGKILL");
    if (point === "create") driver.script.create = die;
    // Everything is on disk then, but nobody was told.
    else host.hooks.on("instance:event", ({ action }) => action === "start" ? die() : undefined);
    host.use("hypervisor").register(driver);
  },
});

const plugins = [store, hypervisor, api, dying] as Plugin[];
const options: Record<string, Record<string, unknown>> = {
  hypervisor: { default_driver: "scripted" },
  api: { listen: "127.0.0.1:0" },
};
const config = {
  dataDir: join(folder, "data"),
  host: HOST_DEFAULTS,
  plugins: plugins.map(({ name }) => ({ name, options: options[name] ?? {} })),
};
const given = new Map(plugins.map((plugin) => [plugin.name, plugin]));
const host = await startHost(config, await loadPlugins(config, { given }));
console.log(host.use("api").url);
