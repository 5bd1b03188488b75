import * as v from "valibot";
import { type Api, type ApiCall, DormouseError, type Hypervisor, type Instance } from "../../main.ts";
import { endOf } from "../shared/clock.ts";
import { formatDuration, parseDuration } from "../shared/duration.ts";
import { LAZY } from "../shared/features.ts";
import { Metrics } from "./counts.ts";
import type { Keeper } from "./keeper.ts";
import type { Lease } from "./leases.ts";

const Time = v.pipe(v.string(), v.isoTimestamp());
const Body = v.pipe(
  v.object({
    ttl: v.optional(v.pipe(
      v.string(),
      v.check((text) => (parseDuration(text) ?? 0) > 0, 'expected a duration above zero such as "10m"'),
      v.description("How long the lease lasts unless it is renewed"),
    )),
  }),
  v.metadata({ ref: "LeaseRequest" }),
);
const LEASE = { lease: v.string(), instance: v.string(), expires_at: Time };
const Renewed = v.pipe(v.object(LEASE), v.metadata({ ref: "Lease" }));
const Acquired = v.pipe(
  v.object({
    ...LEASE,
    latency_ms: v.pipe(v.number(), v.description("Milliseconds from the request until the instance was ready")),
    started: v.pipe(v.boolean(), v.description("Whether it was started or restored for this")),
  }),
  v.metadata({ ref: "AcquiredLease" }),
);

/** What lazy instances have beside the fields of all instances. */
export const PRESENTED = {
  lifecycle_state: v.pipe(
    v.nullable(v.picklist(LAZY)),
    v.description("Null where it is not lazy"),
  ),
  lifecycle_metrics: v.pipe(v.nullable(Metrics), v.description("Null where it is not lazy")),
};
const Agent = v.pipe(
  v.object({ id: v.string(), name: v.string(), type: v.string(), state: v.object(PRESENTED) }),
  v.metadata({ ref: "Agent" }),
);

export interface RouteParts {
  hypervisor: Hypervisor;
  keeper: Keeper;
  /** Milliseconds. */
  defaultTtl: number;
  maxTtl: number;
  /** `lifecycle_state` and `lifecycle_metrics`. */
  present(instance: Instance): Record<string, unknown>;
}

/** `POST .../acquire`, the leases that it gives, and `GET /agents`. */
export function routes(api: Api, { hypervisor, keeper, defaultTtl, maxTtl, present }: RouteParts): void {
  const lazy = ({ params }: ApiCall) => keeper.lazy(hypervisor.resolve(params.id));
  const codes = { ttl: "invalid_ttl" } as const;
  const lease = { body: Body, bodyOptional: true, codes };
  const ttlOf = ({ body }: ApiCall): number | undefined => {
    const { ttl: text } = body as v.InferOutput<typeof Body>;
    const ttl = text === undefined ? undefined : parseDuration(text);
    if (ttl === undefined || ttl <= maxTtl) return ttl;
    const message = `Wrong value of "ttl": expected at most ${formatDuration(maxTtl)}, found ${formatDuration(ttl)}`;
    throw new DormouseError("invalid_ttl", message, { details: { field: "ttl" } });
  };
  const shown = (id: string, granted: Lease) => {
    return { lease: granted.id, instance: id, expires_at: new Date(endOf(granted)).toISOString() };
  };

  api.route({
    method: "POST",
    path: "/instances/:id/acquire",
    scope: "instance:write",
    summary: "Lease a lazy instance: starts or restores it where needed, and answers once it is ready",
    ...lease,
    responses: { 201: { description: "A lease, which keeps it running", schema: Acquired } },
    long: true,
    async handle(call) {
      const entry = lazy(call);
      const { lease, latency, started } = await keeper.acquire(entry, ttlOf(call) ?? defaultTtl, call.signal);
      return { status: 201, body: { ...shown(entry.id, lease), latency_ms: Math.round(latency), started } };
    },
  });

  api.route({
    method: "POST",
    path: "/instances/:id/leases/:lease/renew",
    scope: "instance:write",
    summary: "Let a lease last from now on, for its own time or another",
    ...lease,
    responses: { 200: { description: "The lease", schema: Renewed } },
    handle(call) {
      const entry = lazy(call);
      return { status: 200, body: shown(entry.id, keeper.renew(entry, call.params.lease, ttlOf(call))) };
    },
  });

  api.route({
    method: "DELETE",
    path: "/instances/:id/leases/:lease",
    scope: "instance:write",
    summary: "Release a lease; the last one begins the idle window",
    responses: { 204: { description: "Released" } },
    handle(call) {
      keeper.release(lazy(call), call.params.lease);
      return { status: 204 };
    },
  });

  api.route({
    method: "GET",
    path: "/agents",
    scope: "instance:read",
    summary: "List lazy instances with the state of their lifecycle",
    responses: { 200: { description: "The lazy instances", schema: v.array(Agent) } },
    handle() {
      const agents = hypervisor.list().map((instance) => {
        return { id: instance.id, name: instance.name, type: instance.driver, state: present(instance) };
      });
      return { status: 200, body: agents.filter(({ state }) => state.lifecycle_state !== null) };
    },
  });
}
