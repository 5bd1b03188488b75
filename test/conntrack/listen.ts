/** Run by kernel.ts: opens a source, says which, and what it hears first; `exit` then leaves without closing it. */
import process from "node:process";
import { getLogger } from "@logtape/logtape";
import { openConntrack } from "../../plugins/conntrack/source.ts";

const source = openConntrack({ log: getLogger(["dormouse", "test"]) });
console.log(source.name);
source.start({
  event: () => {},
  connected: () => said("connected"),
  lost: (reason) => said(reason),
});

function said(what: string): void {
  console.log(what);
  if (process.argv[2] === "exit") process.exit(0);
  void source.close();
}
