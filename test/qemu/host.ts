// A host with nothing but the driver, to be killed at any moment: takes one instance through its life again and again, and
// says what it is about to do. Arguments: the data_dir, the instance as JSON, the steps where it is not to be all of them.
import { readFileSync } from "node:fs";
import process from "node:process";
import type { Instance } from "../../main.ts";
import { fleetOf } from "./fixture.ts";
import { QemuDriver } from "../../plugins/qemu/driver.ts";
import { until } from "../helpers.ts";

const [dataDir, json, only] = process.argv.slice(2);
const instance: Instance = JSON.parse(json);
const fleet = fleetOf(dataDir);
const driver = new QemuDriver("qemu-microvm", fleet);
const signal = new AbortController().signal;
const steps: [string, () => Promise<unknown>][] = [
  ["create", () => driver.create(instance)],
  ["start", () => driver.start(instance, signal)],
  ["standby", () => driver.standby(instance, signal)],
  ["restore", () => driver.restore(instance, signal)],
  ["stop", () => driver.stop(instance, signal)],
  ["delete", () => driver.delete(instance)],
];
for (;;) {
  for (const [name, step] of steps.filter(([name]) => !only || only.split(",").includes(name))) {
    console.log(name);
    await step();
    if (name !== "start") continue;
    await until("it runs", async () => (await driver.inspect(instance)).state === "Running", 180_000);
    await until("it counts", () => /^[1-9]/m.test(readFileSync(fleet.vm(instance.id).records.log, "latin1")));
  }
}
