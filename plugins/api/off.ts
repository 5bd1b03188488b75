import { DormouseError } from "../../main.ts";

/** Routes of the HTTP contract that belong to plugins which may be off, by the plugin to turn on. */
const OWNERS: [RegExp, string][] = [
  [/^\/metrics$/, "metrics"],
  [/^\/agents$/, "lazy"],
  [/^\/instances\/[^/]+\/(acquire|leases(\/.*)?)$/, "lazy"],
  [/^\/instances\/[^/]+\/events$/, "journal"],
  [/^\/instances\/[^/]+\/auto-standby\/(status|hold)$/, "conntrack-standby"],
];

/** The error for a path that has no route: which plugin to turn on where one would have it. */
export function noRoute(method: string, path: string, plugins: ReadonlyMap<string, boolean>): DormouseError {
  const shown = `${method} ${path.slice(0, 200)}`;
  const plugin = OWNERS.find(([pattern]) => pattern.test(path))?.[1];
  if (plugin === undefined || plugins.has(plugin)) return new DormouseError("not_found", `No route ${shown}`);
  const message = `Cannot serve ${shown}: turn on its plugin with [plugins.${plugin}] in the config`;
  return new DormouseError("route_off", message, { details: { plugin } });
}
