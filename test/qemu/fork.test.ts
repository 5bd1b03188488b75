import assert from "node:assert/strict";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";
import { parse, stringify } from "smol-toml";
import { copiedArguments, type GuestNetwork } from "../../plugins/qemu/machine.ts";
import { QemuFixture } from "./fixture.ts";
import { skipQemu } from "./guest.ts";
import { idleImage } from "./idle.ts";

const NEVER = new AbortController().signal;
const options = { skip: skipQemu, timeout: 300_000 };

test("copiedArguments() changes who it is and where, and nothing else", (t) => {
  const fixture = new QemuFixture(t, "qemu-microvm", "/none");
  const network: GuestNetwork = {
    ...{ device: "tap9", mac: "52:54:00:00:00:09", address: "10.0.0.9/16", gateway: "10.0.0.1" },
    ...{ address6: null, gateway6: null },
  };
  const args = (name: string, device: string, mac: string) => [
    ...["-name", `guest=${name},debug-threads=on`, "-append", "dormouse.hostname=one ifname=tap1,mac=x"],
    ...["-netdev", `tap,id=net,ifname=${device},script=no,downscript=no`],
    ...["-device", `virtio-net-device,netdev=net,mac=${mac}`, "-device", "pvpanic"],
  ];
  const from = args("one", "tap1", "52:54:00:00:00:01");
  const two = fixture.instance("true", { name: "two" });
  assert.deepEqual(copiedArguments(from, two, network), args("two", "tap9", "52:54:00:00:00:09"));
  assert.deepEqual(copiedArguments(from, two, null), args("two", "tap1", "52:54:00:00:00:01"));
});

test("fork() of what sleeps is of the machine that fell asleep, whatever its image says by now", options, async (t) => {
  const image = idleImage(t);
  const fixture = new QemuFixture(t, "qemu-microvm", image);
  const [source, fork] = [fixture.instance(), fixture.instance()];
  const driver = fixture.open();
  await driver.create(source);
  await driver.start(source, NEVER);
  fixture.records(source).mark("ready");
  await driver.standby(source, NEVER);
  const file = join(image, "image.toml");
  const disk = { file: "image.toml", format: "raw" };
  const other = { ...parse(readFileSync(file, "utf8")), vcpus: 3, size: "96MB", cmdline: "other", disk };
  writeFileSync(file, stringify(other));
  await driver.fork(source, fork);
  const [one, two] = [source, fork].map((each) => fixture.records(each).launch()!);
  const named = (args: readonly string[]) => args.map((arg) => arg.replaceAll(source.name, fork.name));
  assert.deepEqual(
    two.args.filter((arg) => !arg.includes("dormouse.")),
    named(one.args).filter((arg) => !arg.includes("dormouse.")),
  );
  assert.deepEqual(two.memory, { ...one.memory, shared: false });
  for (const each of [fork, source]) await driver.delete(each);
});
