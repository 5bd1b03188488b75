import {
  type Conntrack,
  definePlugin,
  type Flow,
  type Hypervisor,
  type Journal,
  type JournalRow,
  type PluginHooks,
} from "../../main.ts";

const NOTES = ["restart:scheduled", "restart:done", "restart:failed", "restart:gave_up"];
const LAZY_NOTES = ["lazy_start", "lazy_start_failed", "lazy_stop", "lazy_stop_failed"];

/** What `journal.stats` answers or throws. */
export interface Said {
  journal(): ReturnType<Journal["stats"]>;
}

/** Every service that the metrics read, with numbers of which no two are the same. */
export function numbered(said: Partial<Said> = {}) {
  const webhook = { backlog: 31, lag_ms: 32_000, failed: 33, sent: 34, lost: 35 };
  const conntrack: Conntrack = {
    mode: "netlink",
    error: null,
    watch: () => ({ [Symbol.dispose]() {} }),
    follow: () => ({ [Symbol.dispose]() {} }),
    dump: async (): Promise<Flow[]> => [],
    stats: () => ({ events: 1, dropped: 2, malformed: 3, resyncs: 4 }),
  };
  const journal: Journal = {
    read: (): JournalRow[] => [],
    first: 1,
    last: 27,
    follow: () => ({ [Symbol.dispose]() {} }),
    stats: () => ({
      rows: 28,
      pruned: 29,
      streams: 30,
      webhooks: [
        { url: "https://user:secret@hooks.example/services/T0/SECRET?key=SECRET", ...webhook },
        { url: "https://hooks.example/other", ...webhook, backlog: 36 },
      ],
    }),
  };
  return definePlugin({
    name: "numbered",
    requires: ["hypervisor"],
    provides: ["conntrack", "conntrack-standby", "wake", "health", "restart", "lazy", "journal"],
    setup(host) {
      const kinds = [...NOTES, ...LAZY_NOTES].map((type) => [type, { help: "One of this test" }]);
      host.use("hypervisor").declareNotes(Object.fromEntries(kinds));
      host.provide("conntrack", conntrack);
      host.provide("conntrack-standby", { stats: () => ({ active: 5, idle: 6, flows: 7, queued: 8, in_flight: 9 }) });
      host.provide("wake", {
        stats: () => ({ wakes: 1, failed: 1, connections: 12, refused: 13, unknown_hosts: 14, held: 15, piped: 16 }),
        url: null,
      });
      host.provide("health", { stateOf: () => "healthy" as const, stats: () => ({ running: 17, waiting: 18 }) });
      host.provide("restart", { stats: () => ({ waiting: 19, blocked: { max_attempts_exceeded: 20 } }) });
      const states = { stopped: 21, starting: 22, running: 23, idle: 24, stopping: 25, failed: 26 };
      host.provide("lazy", { stats: () => ({ states, leases: 27 }) });
      host.provide("journal", { ...journal, ...(said.journal && { stats: () => said.journal!() }) });
    },
  });
}

/** One event of each kind that the metrics count. */
export function happenings(hooks: PluginHooks, hypervisor: Hypervisor, id: string): void {
  const instance = hypervisor.find(id)!;
  const [instance_id, name, at] = [id, instance.name, 0];
  const decided = { instance_id, instance_name: name, at, reason: "idle", detail: {} };
  hooks.publish("standby:decision", { ...decided, decision: "slept" });
  hooks.publish("standby:flapping", { instance_id, instance_name: name, at, cycles: 10, awake_for: 1 });
  hooks.publish("wake:done", { instance_id, name, cause: "port", error: null, latency_ms: 7 });
  hooks.publish("wake:done", { instance_id, name, cause: "http", error: "no answer", latency_ms: 70_000 });
  hooks.publish("health:changed", { instance_id, instance, at, from: "healthy", to: "unhealthy", error: "refused" });
  hooks.publish("health:probed", { instance_id, type: "tcp", ok: false, duration_ms: 2_000 });
  for (const type of [...NOTES, ...LAZY_NOTES]) {
    const detail = type === "lazy_start" ? { latency_ms: 40 } : {};
    hypervisor.note(id, { type, origin: { actor: "test", cause: "test" }, summary: type, detail });
  }
}
