/**
 * The plugin `conntrack`: the kernel's connection table as a service. `source.ts` chooses how it is read: `netlink.ts`
 * by libc (`libc.ts`, `message.ts`, `dump.ts`), or `program.ts` by the `conntrack` program (`line.ts`); `hub.ts` hands
 * what comes to those who watch an address.
 */
import * as v from "valibot";
import { definePlugin } from "../../main.ts";
import { messageOf } from "../shared/errors.ts";
import { WatchedAddresses } from "./addresses.ts";
import { Hub } from "./hub.ts";
import { openConntrack } from "./source.ts";

const Options = v.object({
  /** `netlink` needs Deno, `program` the Debian package `conntrack`; `auto` takes what is there, netlink first. */
  mode: v.optional(v.picklist(["auto", "netlink", "program"]), "auto"),
});

export default definePlugin({
  name: "conntrack",
  provides: ["conntrack"],
  options: Options,
  setup(host, { mode }) {
    const watched = new WatchedAddresses();
    const hub = new Hub(watched, host.log);
    host.provide("conntrack", hub);
    try {
      const source = openConntrack({ log: host.log, watched, ...(mode !== "auto" && { mode }) });
      host.defer(() => source.close());
      hub.listenTo(source);
    } catch (error) {
      hub.unsupported(messageOf(error));
      host.log.warn("No traffic is seen, so no instance sleeps or wakes by it: {reason}", { reason: messageOf(error) });
    }
  },
});
