import ipaddr from "ipaddr.js";
import * as v from "valibot";
import { DormouseError } from "../../main.ts";
import { formatDuration, parseDuration } from "../shared/duration.ts";
import { about } from "../shared/schemas.ts";

/** The field `auto_standby` of create and update bodies. */
export const AutoStandby = v.strictObject({
  enabled: v.optional(about("Whether it goes to standby when nobody is connected", v.boolean()), false),
  idle_timeout: v.optional(
    about('How long nobody must have been connected, such as "5m"; required where enabled', v.string()),
  ),
  ignore_source_cidrs: v.optional(about("Clients that do not keep it awake, IPv4 and IPv6", v.array(v.string()))),
  ignore_destination_ports: v.optional(about("Ports of it that do not keep it awake", v.array(v.number()))),
});
export type AutoStandby = v.InferOutput<typeof AutoStandby>;

/**
 * The policy as it is kept: durations in Go's spelling, CIDRs masked, each once and sorted. A policy that is off keeps
 * nothing else.
 *
 * @throws {DormouseError} `invalid_auto_standby`
 */
export function normalise(policy: AutoStandby): AutoStandby {
  if (!policy.enabled) return { enabled: false };
  const { idle_timeout: text, ignore_source_cidrs: cidrs = [], ignore_destination_ports: ports = [] } = policy;
  if (text === undefined || text.trim() === "") {
    throw wrong("idle_timeout", 'missing, expected a duration such as "5m"');
  }
  const timeout = parseDuration(text.trim());
  if (timeout === undefined || timeout <= 0) {
    throw wrong("idle_timeout", `expected a duration above zero such as "5m", found ${JSON.stringify(text)}`);
  }
  const masked = [...new Set(cidrs.map((cidr) => cidr.trim()).filter((cidr) => cidr !== "").map(mask))].sort();
  for (const port of ports) {
    if (Number.isInteger(port) && port >= 1 && port <= 65535) continue;
    throw wrong("ignore_destination_ports", `expected ports from 1 to 65535, found ${port}`);
  }
  return {
    enabled: true,
    idle_timeout: formatDuration(timeout),
    ...(masked.length > 0 && { ignore_source_cidrs: masked }),
    ...(ports.length > 0 && { ignore_destination_ports: [...new Set(ports)].sort((a, b) => a - b) }),
  };
}

/** The idle timeout of a normalised policy in milliseconds; undefined for one that is off. */
export function idleTimeoutOf(policy: AutoStandby | undefined): number | undefined {
  return policy?.enabled ? parseDuration(policy.idle_timeout!) : undefined;
}

function mask(cidr: string): string {
  const prefix = /\/(\d{1,3})$/.exec(cidr);
  const plain = prefix && !cidr.includes("%"); // a zone belongs to one machine's links, not to a network
  if (plain && ipaddr.IPv4.isValidCIDRFourPartDecimal(cidr)) {
    return `${ipaddr.IPv4.networkAddressFromCIDR(cidr)}/${Number(prefix[1])}`;
  }
  if (plain && ipaddr.IPv6.isValidCIDR(cidr)) {
    return `${ipaddr.IPv6.networkAddressFromCIDR(cidr).toRFC5952String()}/${Number(prefix[1])}`;
  }
  throw wrong("ignore_source_cidrs", `expected CIDRs such as "10.0.0.0/8", found ${JSON.stringify(cidr)}`);
}

function wrong(key: string, what: string): DormouseError {
  const field = `auto_standby.${key}`;
  return new DormouseError("invalid_auto_standby", `Wrong value of "${field}": ${what}`, { details: { field } });
}
