/** A host that prints what its network says of itself and then closes: `report.ts CONFIG`. */
import process from "node:process";
import { type Instance, loadPlugins, type Network, startHost } from "../../main.ts";
import { readConfig } from "../../plugins/shared/config.ts";
import { messageOf } from "../../plugins/shared/errors.ts";
import { configureLogging } from "../../plugins/shared/logging.ts";

async function outcome(work: () => unknown): Promise<string> {
  try {
    await work();
    return "done";
  } catch (error) {
    return messageOf(error);
  }
}

async function report({ enabled, reason, allocate, release, attach, detach }: Network) {
  const instance = {
    id: "a",
    name: "a",
    network: { enabled: false, ip: null, mac: null, ip6: null },
  } as unknown as Instance;
  return {
    enabled,
    reason,
    allocate: await outcome(() => allocate("a")),
    release: await outcome(() => release("a")),
    attach: await outcome(() => attach(instance)),
    detach: await outcome(() => detach(instance)),
  };
}

async function main(file: string) {
  const { config } = readConfig(file, { env: {}, dataDir: "" });
  configureLogging({ level: "info", format: "json" });
  const host = await startHost(config, await loadPlugins(config));
  console.log(JSON.stringify(await report(host.use("network"))));
  await host.close();
}

void main(process.argv[2]);
