import { driverContract } from "../contract/driver.ts";
import { QemuFixture } from "./fixture.ts";
import { demoImage, skipGuest } from "./guest.ts";

const image = skipGuest ? "" : await demoImage();

// On one runtime only: what differs from the other kind of machine is QEMU's, and each start takes seconds of a processor.
if ("Deno" in globalThis) {
  driverContract({ name: "qemu", make: (t) => new QemuFixture(t, "qemu", image), lacking: skipGuest || null });
}
