import * as v from "valibot";
import { DormouseError, type Instance } from "../../main.ts";
import { formatDuration, parseDuration } from "../shared/duration.ts";
import { about } from "../shared/schemas.ts";

const Port = v.pipe(v.number(), v.integer(), v.minValue(1), v.maxValue(65_535));
// Without the flag `i`, which the OpenAPI document could not say.
const HOST = /^(?=.{1,253}\.?$)[A-Za-z0-9_]([\w-]*[A-Za-z0-9])?(\.[A-Za-z0-9_]([\w-]*[A-Za-z0-9])?)*\.?$/;

export const WakePolicy = v.strictObject({
  enabled: v.optional(about("Whether a connection wakes it", v.boolean()), true),
  ports: v.optional(
    v.pipe(
      v.array(v.strictObject({
        host_port: v.pipe(Port, v.description("The port of this machine")),
        guest_port: v.pipe(Port, v.description("The port of the instance that it leads to")),
        protocol: v.optional(about("The only one that there is", v.literal("tcp")), "tcp"),
      })),
      v.maxLength(64),
      v.description("Ports of this machine that lead to it, asleep or awake"),
    ),
    [],
  ),
  hosts: v.optional(
    v.pipe(
      v.array(v.pipe(v.string(), v.regex(HOST, 'expected a host name such as "app.example.test"'))),
      v.maxLength(64),
      v.description("Names that `http_listen` routes here"),
    ),
    [],
  ),
  http_port: v.optional(
    v.pipe(Port, v.description("The port of the instance that the hosts lead to; the first guest_port, or 80")),
  ),
  ready: v.optional(
    about(
      "What must answer before a client is let through: its port, or its health_check",
      v.picklist(["connect", "health"]),
    ),
    "connect",
  ),
  timeout: v.optional(
    v.pipe(
      v.string(),
      v.check((text) => (parseDuration(text) ?? 0) > 0, 'expected a duration above zero such as "30s"'),
      v.description("How long a connection waits for the instance"),
    ),
    "30s",
  ),
  start_on_demand: v.optional(
    v.pipe(v.boolean(), v.description("Whether a connection starts it when Stopped; the config says it when absent")),
  ),
});
export type WakePolicy = v.InferOutput<typeof WakePolicy>;
export type PublishedPort = WakePolicy["ports"][number];

/** Of instances that have none: a connection to their own address wakes them. */
export const DEFAULT: WakePolicy = v.parse(WakePolicy, {});

/** What this host can do for a policy. */
export interface Means {
  /** Whether `http_listen` is set. */
  http: boolean;
  /** Whether there is a plugin `health`. */
  health: boolean;
  /** Whether instances have addresses of their own; without, they listen on this machine's. */
  network: boolean;
  /** Whether connections can be made to the instance. */
  reaches(instance: Instance): boolean;
  /** Whether connections to instances' own addresses can be seen. */
  conntrack: boolean;
}

/** The policy as it is kept. @throws {DormouseError} `invalid_wake` */
export function normalise(policy: WakePolicy, instance: Instance, means: Means): WakePolicy {
  const { ports, ready } = policy;
  const hosts = [...new Set(policy.hosts.map((host) => host.toLowerCase().replace(/\.$/, "")))];
  const twice = ports.find(({ host_port }, i) => ports.findIndex((other) => other.host_port === host_port) !== i);
  if (twice) throw wrong("ports", `host port ${twice.host_port} is there twice`);
  if (hosts.length > 0 && !means.http) throw wrong("hosts", "there is no http_listen in [plugins.wake]");
  if (ready === "health" && !means.health) throw wrong("ready", '"health" needs the plugin "health"');
  if (!means.reaches(instance) && (ports.length > 0 || hosts.length > 0)) {
    throw wrong(ports.length > 0 ? "ports" : "hosts", "the instance has no network");
  }
  // On the machine's own network the instance itself listens on the guest port.
  const same = means.network ? undefined : ports.find(({ host_port, guest_port }) => host_port === guest_port);
  if (same) {
    throw wrong("ports", `${same.host_port} leads to itself, for the instance shares the machine's own network`);
  }
  return { ...policy, hosts, timeout: formatDuration(parseDuration(policy.timeout)!) };
}

/** What a fork keeps: ports and hosts belong to one instance only. */
export function forked(policy: WakePolicy): WakePolicy {
  return { ...policy, ports: [], hosts: [] };
}

/**
 * Refuses an instance that would fall asleep and that no traffic could wake, unless it says so itself.
 *
 * @throws {DormouseError} `invalid_wake`
 */
export function refuseEndlessSleep({ policies, network }: Instance, means: Means): void {
  const standby = policies.auto_standby as { enabled?: boolean } | undefined;
  const policy = policyOf({ policies });
  if (!standby?.enabled || !policy.enabled || policy.ports.length > 0 || policy.hosts.length > 0) return;
  if (means.network && means.conntrack && network.enabled) return;
  const message = 'Cannot let it sleep: no connection could wake it. Give it "wake.ports" or "wake.hosts", a network ' +
    'of its own, or "wake": {"enabled": false}';
  throw new DormouseError("invalid_wake", message, { details: { field: "auto_standby" } });
}

export function policyOf({ policies }: Pick<Instance, "policies">): WakePolicy {
  return policies.wake as WakePolicy | undefined ?? DEFAULT;
}

/** Milliseconds that a connection waits. */
export function timeoutOf(policy: WakePolicy): number {
  return parseDuration(policy.timeout)!;
}

export function httpPortOf({ http_port, ports }: WakePolicy): number {
  return http_port ?? ports[0]?.guest_port ?? 80;
}

/** Every port of the instance that something leads to. */
export function guestPortsOf(policy: WakePolicy): Set<number> {
  const ports = policy.ports.map(({ guest_port }) => guest_port);
  return new Set(policy.hosts.length > 0 ? [...ports, httpPortOf(policy)] : ports);
}

function wrong(key: string, why: string): DormouseError {
  const field = `wake.${key}`;
  return new DormouseError("invalid_wake", `Wrong value of "${field}": ${why}`, { details: { field } });
}
