/**
 * The `process` driver. `command.ts` makes the command line of an instance, with `root.ts`; `shim.ts` starts it,
 * `launch.ts` is what that leaves on disk; `enclosure.ts` holds its processes together where there are no cgroups, which
 * `plugins/shared/cgroup.ts` knows; `workload.ts` is all of that for one instance. `exits.ts` notices ends, `exec.ts` and
 * `stats.ts` do as they are called, and `driver.ts` is the driver.
 */
import * as v from "valibot";
import { definePlugin } from "../../main.ts";
import { duration, size } from "../shared/schemas.ts";
import { ProcessDriver } from "./driver.ts";

const Options = v.object({
  /** From SIGTERM to SIGKILL. */
  grace: v.optional(duration(), "10s"),
  /** From which size an instance's log is rotated, and how many rotated files are kept. */
  log_max_size: v.optional(size({ min: 65_536 }), "8MB"),
  log_files: v.optional(v.pipe(v.number(), v.integer(), v.minValue(0), v.maxValue(100)), 3),
  /** The cgroup that holds those of all instances; empty to do without. */
  cgroup_parent: v.optional(v.pipe(v.string(), v.regex(/^[\w-]*$/, "use letters, digits, _ and -")), "dormouse"),
  /** PATH of instances that have none in their env. */
  path: v.optional(v.string(), "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
});

export default definePlugin({
  name: "process",
  requires: ["hypervisor", "network?"],
  options: Options,
  setup({ dataDir, log, hooks, use, find, defer }, options) {
    const hypervisor = use("hypervisor");
    const network = find("network");
    const changed = (id: string, cause: string) => hypervisor.changed(id, cause);
    const driver = new ProcessDriver({ dataDir, network, log, options, changed });
    defer(() => driver[Symbol.asyncDispose]());
    const registration = hypervisor.register(driver);
    defer(async () => await registration[Symbol.asyncDispose]());
    // After the registry has adopted what is its own.
    hooks.guard("host:ready", async () => {
      const strays = await driver.sweep(new Set(hypervisor.list().map(({ id }) => id)));
      if (strays.length > 0) log.info("Removed what belonged to no instance: {strays}", { strays: strays.join(", ") });
    }, { priority: 50, timeout: 60_000 });
  },
});
