import { readdirSync, readFileSync, writeFileSync } from "node:fs";

const FOLDER = "/proc/sys/net";

/** Sets a value below `/proc/sys/net`, unless it is that already. */
export function sysctl(path: string, value: string): void {
  if (read(path) !== value) writeFileSync(`${FOLDER}/${path}`, value);
}

/**
 * Makes this machine forward IPv6. A router does not listen to other routers: with `forwarding` the kernel ignores their
 * advertisements, and forgets the default routes that it has from them, on each device where `accept_ra` is not 2. So
 * where it was 1 it is set to 2, before, or a machine that has its IPv6 by advertisements would be cut off. One that
 * forwards already has been told what its owner wants of it.
 */
export function forward6(): void {
  if (read("ipv6/conf/all/forwarding") === "1") return;
  // `default` too, for the devices that come later.
  for (const device of readdirSync(`${FOLDER}/ipv6/conf`)) {
    if (device !== "all") keepListening(`ipv6/conf/${device}`);
  }
  sysctl("ipv6/conf/all/forwarding", "1");
}

function keepListening(folder: string): void {
  try {
    const listens = read(`${folder}/accept_ra`) === "1" && read(`${folder}/forwarding`) === "0";
    if (listens) sysctl(`${folder}/accept_ra`, "2");
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "ENOENT") throw error; // the device is gone by now
  }
}

function read(path: string): string {
  return readFileSync(`${FOLDER}/${path}`, "utf8").trim();
}
