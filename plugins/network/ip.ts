import { existsSync, readdirSync, readFileSync, statfsSync } from "node:fs";
import type { ExecaError } from "execa";
import { CommandError, run } from "../shared/run.ts";

const NAMESPACES = "/run/netns";
const NSFS_MAGIC = 0x6e736673; // linux/magic.h
/** Tries after a list that was interrupted; each takes milliseconds. */
const DUMPS = 50;

/**
 * Hands lines to one `ip -batch`, which stops at the first that fails; in a namespace where one is given.
 *
 * @throws {CommandError} that names the line
 */
export async function ip(lines: readonly string[], namespace?: string): Promise<void> {
  try {
    await batch(lines, namespace ? ["-n", namespace] : []);
  } catch (error) {
    if (!(error instanceof CommandError)) throw error;
    const [trailer, number] = /\s*Command failed -:(\d+)/.exec(error.stderr) ?? [];
    if (trailer === undefined) throw error;
    const stderr = error.stderr.replace(trailer, "");
    throw new CommandError(`ip ${lines[Number(number) - 1]}`, error.cause as ExecaError, stderr);
  }
}

/**
 * The same, but goes on after a line that fails. What a line is about may be gone: the kernel takes a namespace apart
 * some time after its deletion, and its devices with it, between our look and our touch.
 *
 * @throws {CommandError} at the end, where a line failed for another reason
 */
export async function ipEach(lines: readonly string[]): Promise<void> {
  const gone = /Cannot find device|No such (device|file or directory)|^Command failed -:\d+$/;
  for (let again = DUMPS;; again--) {
    try {
      return await batch(lines, ["-force"]);
    } catch (error) {
      if (!(error instanceof CommandError)) throw error;
      const said = error.stderr.split("\n").filter((line) => line !== "");
      // What changes while `ip` lists it is listed again: from half a list it may have taken what is there for gone.
      if (again > 0 && said.includes("Dump was interrupted and may be inconsistent.")) continue;
      if (said.length > 0 && said.every((line) => gone.test(line))) return;
      throw error;
    }
  }
}

async function batch(lines: readonly string[], options: string[]): Promise<void> {
  if (lines.length > 0) await run("ip", [...options, "-batch", "-"], { input: `${lines.join("\n")}\n` });
}

/** The network devices of this process's namespace. `/sys/class/net` would be those of whoever mounted it. */
export function devices(): Set<string> {
  return new Set(readFileSync("/proc/net/dev", "utf8").match(/^ *[^ :|]+(?=:)/gm)?.map((name) => name.trim()));
}

/** The names under which network namespaces are kept, whole or not. */
export function namespaces(): string[] {
  return existsSync(NAMESPACES) ? readdirSync(NAMESPACES) : [];
}

/** What is there under the name: a dead `ip netns add` can leave a `file` that is no namespace. */
export function namespaceAt(name: string): "namespace" | "file" | null {
  const path = `${NAMESPACES}/${name}`;
  if (!existsSync(path)) return null;
  return statfsSync(path).type === NSFS_MAGIC ? "namespace" : "file";
}

export interface Route {
  /** `default`, a CIDR, or an address. */
  dst: string;
  dev?: string;
  gateway?: string;
  type?: string;
}

/** Every route of every table, of one family. @throws {CommandError} */
export async function routes(family: "-4" | "-6"): Promise<Route[]> {
  return JSON.parse(await run("ip", ["-j", family, "route", "show", "table", "all"]));
}

export interface Link {
  ifname: string;
  address: string;
  ifalias?: string;
  linkinfo?: { info_kind?: string };
  addr_info: { family: string; local: string; prefixlen: number; scope: string }[];
}

/** A device of this process's namespace that is there. @throws {CommandError} */
export async function linkOf(name: string): Promise<Link> {
  return JSON.parse(await run("ip", ["-j", "-d", "addr", "show", "dev", name]))[0];
}

/** Whether a bridge has a port at whose other end somebody is: the TAP of a machine that runs, an instance's veth. */
export async function hasPlugged(bridge: string): Promise<boolean> {
  const ports: { flags: string[] }[] = JSON.parse(await run("ip", ["-j", "link", "show", "master", bridge]));
  return ports.some(({ flags = [] }) => flags.includes("LOWER_UP"));
}

/** What a failed command says, for a line in the log. */
export function oneLine(error: CommandError): string {
  return error.message.replaceAll(/\s*\n\s*/g, "; ");
}
