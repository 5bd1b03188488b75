import { driverContract } from "../contract/driver.ts";
import { CGROUP_PARENT, IS_ROOT, ProcessFixture } from "./fixture.ts";

driverContract({
  name: "process",
  make: (t) => new ProcessFixture(t, { cgroup_parent: IS_ROOT ? CGROUP_PARENT : "" }),
});
driverContract({ name: "process without cgroups", make: (t) => new ProcessFixture(t, { cgroup_parent: "" }) });
