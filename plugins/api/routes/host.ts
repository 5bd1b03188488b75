import process from "node:process";
import * as v from "valibot";
import type { Api, Driver, Host, Hypervisor, Network } from "../../../main.ts";
import { CapabilitiesAnswer, HealthAnswer, ResourcesAnswer } from "../host-schemas.ts";
import { resourcesOf } from "../resources.ts";

const OPERATING_SYSTEMS: Record<string, string> = { win32: "windows" };
const ARCHITECTURES: Record<string, string> = { x64: "amd64", ia32: "386" };
const FEATURES = ["instances", "exec", "logs", "events"];

/** Routes that show the host: health, capabilities, resources. */
export function hostRoutes(api: Api, host: Host, hypervisor: Hypervisor, network: Network | undefined): void {
  api.route({
    method: "GET",
    path: "/health",
    scope: "public",
    summary: "Whether the host is ready, with the readiness of every plugin",
    responses: {
      200: { description: "Ready", schema: HealthAnswer },
      503: { description: "Starting or closing", schema: HealthAnswer },
    },
    handle() {
      const plugins = Object.fromEntries(host.plugins);
      const ready = Object.values(plugins).every((up) => up);
      const status = host.signal.aborted ? "closing" : ready ? "ok" : "starting";
      const body: v.InferOutput<typeof HealthAnswer> = { status, plugins };
      return { status: status === "ok" ? 200 : 503, body };
    },
  });

  api.route({
    method: "GET",
    path: "/capabilities",
    scope: "resource:read",
    summary: "What this host can do: its drivers and their features, its network",
    responses: { 200: { description: "The capabilities", schema: CapabilitiesAnswer } },
    handle() {
      const runtimes = hypervisor.drivers().map(runtimeOf).toSorted((a, b) => a.name < b.name ? -1 : 1);
      const name = hypervisor.defaultDriver;
      const os = OPERATING_SYSTEMS[process.platform] ?? process.platform;
      const arch = ARCHITECTURES[process.arch] ?? process.arch;
      const body: v.InferOutput<typeof CapabilitiesAnswer> = {
        server: { version: host.version, api_version: host.version },
        host: { os, arch },
        default_runtime: { name, available: runtimes.some((runtime) => runtime.name === name && runtime.available) },
        runtimes,
        network: {
          model: "bridge",
          // On the host's own network they reach each other as well.
          guest_to_guest: true,
          ...(network?.enabled && { gateway: network.gateway, subnet: network.subnet }),
        },
        images: { platforms: [`${os}/${arch}`], default_platform: `${os}/${arch}` },
        features: FEATURES,
      };
      return { status: 200, body };
    },
  });

  api.route({
    method: "GET",
    path: "/resources",
    scope: "resource:read",
    summary: "What this machine has, and what of it instances that are awake were given",
    responses: { 200: { description: "The resources", schema: ResourcesAnswer } },
    handle: async () => ({ status: 200, body: await resourcesOf(hypervisor.list(), host.dataDir) }),
  });
}

function runtimeOf(driver: Driver) {
  const features: string[] = [...driver.features];
  // The contract's name for what a standby keeps.
  if (driver.features.has("standby")) features.push("snapshots");
  return { name: driver.name, available: driver.unavailable() === null, features: features.toSorted() };
}
