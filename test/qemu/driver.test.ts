import { driverContract } from "../contract/driver.ts";
import { QemuFixture } from "./fixture.ts";
import { demoImage, skipGuest } from "./guest.ts";

const image = skipGuest ? "" : await demoImage();

driverContract({
  name: "qemu-microvm",
  make: (t) => new QemuFixture(t, "qemu-microvm", image),
  lacking: skipGuest || null,
});
