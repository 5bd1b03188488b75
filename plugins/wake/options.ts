import ipaddr from "ipaddr.js";
import * as v from "valibot";

const Bound = v.pipe(v.number(), v.integer(), v.minValue(1));

export const WakeOptions = v.object({
  /** Addresses of this machine on which host ports are published; `::` is all of them, IPv4 and IPv6. */
  bind: v.optional(
    v.pipe(v.array(v.pipe(v.string(), v.check(ipaddr.isValid, "expected an IP address"))), v.minLength(1)),
    ["::"],
  ),
  /** Where HTTP is routed by Host to the instances that list it, as `0.0.0.0:80`; off when absent. */
  http_listen: v.optional(
    v.pipe(
      v.string(),
      v.check(
        (text) => parseAddress(text) !== undefined,
        'expected an address and port such as "0.0.0.0:80" or "[::]:80"',
      ),
    ),
  ),
  /** Whether a connection starts an instance that is Stopped, where its policy does not say. */
  start_on_demand: v.optional(v.boolean(), false),
  /** Connections that may wait for instances to wake, for one and for all together. */
  max_held_per_instance: v.optional(Bound, 128),
  max_held: v.optional(Bound, 1024),
});
export type WakeOptions = v.InferOutput<typeof WakeOptions>;

/** The parts of `127.0.0.1:80`, `[::1]:80` or `localhost:80`; port 0 is any that is free. */
export function parseAddress(text: string): { host: string; port: number } | undefined {
  const [, v6, other, digits] = /^(?:\[([^\]]+)\]|([^:\s[\]]+)):(\d{1,5})$/.exec(text) ?? [];
  const port = Number(digits);
  if (digits === undefined || port > 65_535 || (v6 !== undefined && !ipaddr.IPv6.isValid(v6))) return undefined;
  return { host: v6 ?? other, port };
}
