import { driverContract } from "../contract/driver.ts";
import { QemuFixture } from "./fixture.ts";
import { demoImage, skipGuest } from "./guest.ts";

const image = skipGuest ? "" : await demoImage();

driverContract({ name: "qemu", make: (t) => new QemuFixture(t, "qemu", image), lacking: skipGuest || null });
