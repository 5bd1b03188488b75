// A host with nothing but the driver, to be killed while it compresses the memory of an instance that sleeps. Arguments:
// the data_dir, the instance as JSON.
import process from "node:process";
import { QemuDriver } from "../../plugins/qemu/driver.ts";
import { fleetOf } from "./fixture.ts";

const [dataDir, json] = process.argv.slice(2);
await new QemuDriver("qemu-microvm", fleetOf(dataDir)).adopt(JSON.parse(json));
setInterval(() => {}, 1_000);
