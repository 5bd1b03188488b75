/** The source for this process: netlink where the runtime can call libc, else the `conntrack` program. */
import process from "node:process";
import { messageOf } from "../shared/errors.ts";
import { missingProgram } from "../shared/programs.ts";
import type { ConntrackSource, SourceOptions } from "./flow.ts";
import { NetlinkSource } from "./netlink.ts";
import { ProgramSource } from "./program.ts";

export interface OpenOptions extends SourceOptions {
  /** The only one to try; both in turn when absent. */
  mode?: ConntrackSource["name"];
}

/** It listens once it is started. @throws {Error} with the reason where this machine has neither */
export function openConntrack({ mode, ...options }: OpenOptions): ConntrackSource {
  if (process.platform !== "linux") throw new Error(`Cannot read conntrack: this is ${process.platform}, not Linux`);
  const reasons: string[] = [];
  if (mode !== "program") {
    try {
      return new NetlinkSource(options);
    } catch (error) {
      reasons.push(messageOf(error));
    }
  }
  if (mode !== "netlink") {
    if (missingProgram(["conntrack"]) === undefined) return new ProgramSource(options);
    reasons.push("there is no conntrack program");
  }
  throw new Error(`Cannot read conntrack: ${reasons.join(", ")}`);
}
