// A host with nothing but the process driver, to be killed at any moment: takes one instance through its life again and
// again. Arguments: the data_dir, the cgroup parent, the instance as JSON.
import process from "node:process";
import { getLogger } from "@logtape/logtape";
import type { Instance } from "../../main.ts";
import { ProcessDriver } from "../../plugins/process/driver.ts";
import { OPTIONS } from "./fixture.ts";

const [dataDir, cgroup_parent, json] = process.argv.slice(2);
const instance: Instance = JSON.parse(json);
const driver = new ProcessDriver({
  dataDir,
  network: undefined,
  log: getLogger(["dormouse", "process"]),
  changed: () => undefined,
  options: { ...OPTIONS, cgroup_parent },
});
const signal = new AbortController().signal;
await driver.adopt(instance);
console.log("ready");
for (;;) {
  await driver.create(instance);
  await driver.start(instance, signal);
  await driver.standby(instance, signal);
  await driver.restore(instance, signal);
  await driver.pause(instance);
  await driver.resume(instance);
  await driver.stop(instance, signal);
  await driver.start(instance, signal);
  await driver.delete(instance);
}
