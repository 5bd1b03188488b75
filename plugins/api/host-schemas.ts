import * as v from "valibot";

export const HealthAnswer = v.pipe(
  v.object({ status: v.picklist(["ok", "starting", "closing"]), plugins: v.record(v.string(), v.boolean()) }),
  v.metadata({ ref: "Health" }),
);

export const CapabilitiesAnswer = v.pipe(
  v.object({
    server: v.object({ version: v.string(), api_version: v.string() }),
    host: v.object({ os: v.string(), arch: v.string() }),
    default_runtime: v.object({ name: v.string(), available: v.boolean() }),
    runtimes: v.array(v.object({ name: v.string(), available: v.boolean(), features: v.array(v.string()) })),
    network: v.object({
      model: v.picklist(["bridge", "nat"]),
      guest_to_guest: v.boolean(),
      gateway: v.optional(v.string()),
      subnet: v.optional(v.string()),
    }),
    images: v.object({ platforms: v.array(v.string()), default_platform: v.string() }),
    features: v.array(v.string()),
  }),
  v.metadata({ ref: "Capabilities" }),
);

const Resource = v.pipe(
  v.object({
    type: v.string(),
    capacity: v.pipe(v.number(), v.description("vCPUs, bytes, or bytes a second for the network")),
    effective_limit: v.number(),
    allocated: v.number(),
    available: v.number(),
    oversub_ratio: v.number(),
    source: v.string(),
  }),
  v.metadata({ ref: "ResourceStatus" }),
);
export type Resource = v.InferOutput<typeof Resource>;

export const ResourcesAnswer = v.pipe(
  v.object({
    cpu: Resource,
    memory: Resource,
    disk: Resource,
    network: Resource,
    allocations: v.array(v.object({
      instance_id: v.string(),
      instance_name: v.string(),
      cpu: v.number(),
      memory_bytes: v.number(),
    })),
  }),
  v.metadata({ ref: "Resources" }),
);
export type ResourcesAnswer = v.InferOutput<typeof ResourcesAnswer>;
