/** Attaches and detaches instances without end, for a test to kill: `churn.ts CONFIG`. It prints a dot for each. */
import { writeSync } from "node:fs";
import process from "node:process";
import { type Instance, loadPlugins, type RunningHost, startHost } from "../../main.ts";
import { readConfig } from "../../plugins/shared/config.ts";

async function churn(host: RunningHost, id: string) {
  const { allocate, attach, detach } = host.use("network");
  const instance = { id, name: id, network: { enabled: true, ...allocate(id) } } as Instance;
  for (let times = 0; times < 200; times++) {
    await attach(instance);
    writeSync(1, ".");
    await detach(instance);
  }
}

async function main(file: string) {
  const { config } = readConfig(file, { env: {}, dataDir: "" });
  const host = await startHost(config, await loadPlugins(config));
  await Promise.all(["x", "y", "z"].map((id) => churn(host, id)));
}

void main(process.argv[2]);
