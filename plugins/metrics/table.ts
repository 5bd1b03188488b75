import type { ServiceName, StandbyDecision } from "../../main.ts";

/** The upper bounds of a histogram's buckets, in seconds, and why these. */
export interface Buckets {
  readonly bounds: readonly number[];
  readonly why: string;
}

/** What a metric's numbers are shown in where its name does not say: `_seconds`, `_bytes` and `_total` do. */
type Unit = "average" | "share" | "date" | "info";

interface Common<L extends string> {
  readonly help: string;
  readonly labels: readonly L[];
  readonly unit?: Unit;
}
export interface CounterSpec<L extends string = string> extends Common<L> {
  readonly type: "counter";
  /** Values of its one label that are there from the start, at zero, so that a first increase is seen as one. */
  readonly zeros?: readonly string[];
}
export interface GaugeSpec<L extends string = string> extends Common<L> {
  readonly type: "gauge";
}
export interface HistogramSpec<L extends string = string> extends Common<L> {
  readonly type: "histogram";
  readonly buckets: Buckets;
}
export type Spec<L extends string = string> = CounterSpec<L> | GaugeSpec<L> | HistogramSpec<L>;

export interface Group {
  readonly title: string;
  /** The service that the numbers come from: without it none of them is there. */
  readonly service?: ServiceName;
  readonly metrics: Readonly<Record<string, Spec>>;
}

const counter = <const L extends string = never>(
  help: string,
  labels: readonly L[] = [],
  more: Pick<CounterSpec, "unit" | "zeros"> = {},
): CounterSpec<L> => ({ type: "counter", help, labels, ...more });
const gauge = <const L extends string = never>(
  help: string,
  labels: readonly L[] = [],
  more: Pick<GaugeSpec, "unit"> = {},
): GaugeSpec<L> => ({ type: "gauge", help, labels, ...more });
const histogram = <const L extends string = never>(
  help: string,
  buckets: Buckets,
  labels: readonly L[] = [],
): HistogramSpec<L> => ({ type: "histogram", help, buckets, labels });

const ACTION_BUCKETS: Buckets = {
  bounds: [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60],
  why:
    "a standby or restore of a process takes 1 to 5 ms, a creation tens, a virtual machine seconds, a stop its grace",
};
const PROBE_BUCKETS: Buckets = {
  bounds: [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30],
  why: "a probe of a local port takes about 1 ms, and one that hangs its timeout of seconds",
};
const WAKE_BUCKETS: Buckets = {
  bounds: [0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60],
  why: "a frozen process is back within 20 ms, which is its budget; one that is gone takes a start",
};
const REQUEST_BUCKETS: Buckets = {
  bounds: [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60],
  why: "an answer from memory takes 1 ms, an action what its driver takes, a wait up to its timeout",
};
const LAG_BUCKETS: Buckets = {
  bounds: [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5],
  why: "below 20 ms at p99 is the budget, and a timer alone is up to 1 ms late",
};

const DECISIONS = Object.keys(
  {
    requested: 0,
    cancelled: 0,
    slept: 0,
    vetoed: 0,
    failed: 0,
    raced_restored: 0,
    restore_failed: 0,
  } satisfies Record<StandbyDecision["decision"], 0>,
);
const RESULTS = ["ok", "failed"];

const HOST = {
  dormouse_build_info: gauge("What runs: always 1", ["version", "runtime", "runtime_version"], { unit: "info" }),
  dormouse_plugin_up: gauge("Whether the plugin is set up: 1 or 0", ["plugin"]),
  dormouse_event_loop_lag_seconds: histogram("How late a timer of 100 ms rings", LAG_BUCKETS),
  dormouse_scrape_errors_total: counter("Groups of metrics left out of a scrape, as reading them failed", ["group"]),
  dormouse_heap_used_bytes: gauge("Memory that objects of the JavaScript heap take"),
  dormouse_heap_size_bytes: gauge("Memory reserved for the JavaScript heap"),
  dormouse_external_memory_bytes: gauge("Memory outside of the heap that its objects hold, such as buffers"),
  process_cpu_seconds_total: counter("CPU time of the host process, user and system", [], { unit: "share" }),
  process_resident_memory_bytes: gauge("Memory of the host process that is in RAM"),
  process_virtual_memory_bytes: gauge("Address space of the host process"),
  process_open_fds: gauge("Open file descriptors of the host process"),
  process_max_fds: gauge("File descriptors that the host process may open"),
  process_start_time_seconds: gauge("When the host process was started, since the epoch", [], { unit: "date" }),
};

const BUS = {
  dormouse_bus_subscribers: gauge("Subscribers of an event hook", ["hook", "consumer"]),
  dormouse_bus_queue_depth: gauge("Events that wait in the consumer's fullest queue", ["hook", "consumer"]),
  dormouse_bus_dropped_total: counter("Events that did not fit and became a marker", ["hook", "consumer"]),
  dormouse_bus_handler_errors_total: counter("Events whose handler threw", ["hook", "consumer"]),
};

const INSTANCES = {
  dormouse_instances: gauge("Instances", ["state", "driver"]),
  dormouse_instance_phase_seconds_total: counter(
    "Time that instances spent in the state, added up over all of them; its rate is how many were in it on average",
    ["state", "driver"],
    { unit: "average" },
  ),
  dormouse_action_duration_seconds: histogram(
    "Requests of the registry, the wait for the instance's lock included",
    ACTION_BUCKETS,
    [
      "action",
      "driver",
      "result",
    ],
  ),
  dormouse_notes_total: counter("Entries of instances' histories that are no change of state", ["type"]),
};

const USAGE = {
  dormouse_instance_cpu_seconds_total: counter("CPU time of the instance", ["name", "id"], { unit: "share" }),
  dormouse_instance_memory_bytes: gauge("Memory of the instance that is in RAM; only while it is awake", [
    "name",
    "id",
  ]),
  dormouse_instance_network_receive_bytes_total: counter("Bytes that the instance received", ["name", "id"]),
  dormouse_instance_network_transmit_bytes_total: counter("Bytes that the instance sent", ["name", "id"]),
  dormouse_instances_unlabelled: gauge("Instances beyond the label budget, which are summed under _other"),
  dormouse_instance_reads_total: counter("Readings of what an instance uses", ["result"], {
    zeros: ["ok", "failed", "late"],
  }),
};

const CONNTRACK = {
  dormouse_conntrack_up: gauge("Whether connection events arrive: 1 or 0"),
  dormouse_conntrack_events_total: counter("Connection events of the kernel that were read"),
  dormouse_conntrack_dropped_total: counter("Times that the kernel's queue of connection events overflowed"),
  dormouse_conntrack_malformed_total: counter("Connection events that could not be understood"),
  dormouse_conntrack_resyncs_total: counter("Times that listening began, each followed by a dump of the table"),
  dormouse_conntrack_flows: gauge("Flows that the kernel tracks, of the whole machine"),
  dormouse_conntrack_flows_limit: gauge("Flows that the kernel can track; beyond it connections fail"),
};

const STANDBY = {
  dormouse_standby_decisions_total: counter("Steps on the way to sleep, and what ended it", ["decision"], {
    zeros: DECISIONS,
  }),
  dormouse_standby_flapping_total: counter("Instances left awake because they slept and woke too often"),
  dormouse_standby_instances: gauge("Awake instances that sleep by themselves: in use, or counting down", ["status"]),
  dormouse_standby_attempts: gauge("Instances that are queued to sleep, or on their way", ["phase"]),
  dormouse_standby_active_flows: gauge("Connections that keep instances awake"),
};

const WAKE = {
  dormouse_wake_duration_seconds: histogram(
    "Attempts to wake an instance, from the first connection to Running",
    WAKE_BUCKETS,
    [
      "cause",
      "result",
    ],
  ),
  dormouse_wake_connections_total: counter("Connections and requests that came to the wake path"),
  dormouse_wake_refused_total: counter("Connections of these that were not served"),
  dormouse_wake_unknown_hosts_total: counter("HTTP requests for hosts that no instance has"),
  dormouse_wake_held_connections: gauge("Connections that wait for their instance"),
  dormouse_wake_piped_connections: gauge("Connections that are passed on byte by byte"),
};

const HEALTH = {
  dormouse_health_instances: gauge("Instances by what their probes say", ["status"]),
  dormouse_health_changes_total: counter("Changes to the status", ["status"]),
  dormouse_health_probe_duration_seconds: histogram("Probes whose result counted", PROBE_BUCKETS, ["type", "result"]),
  dormouse_health_probes: gauge("Probes under way, and those that wait for a place", ["phase"]),
};

const RESTART = {
  dormouse_restarts_total: counter("Restarts by policy; given up is what gets none any more", ["result"], {
    zeros: ["ok", "failed", "gave_up"],
  }),
  dormouse_restarts_scheduled_total: counter("Restarts that were planned, each after its back-off"),
  dormouse_restart_waiting_instances: gauge("Instances that wait for their next attempt"),
  dormouse_restart_blocked_instances: gauge("Instances that get no attempt any more", ["reason"]),
};

const LAZY = {
  dormouse_lazy_instances: gauge("Lazy instances", ["state"]),
  dormouse_lazy_leases: gauge("Leases that are held"),
  dormouse_lazy_starts_total: counter("Starts for a lease", ["result"], { zeros: RESULTS }),
  dormouse_lazy_stops_total: counter("Stops after the idle window", ["result"], { zeros: RESULTS }),
  dormouse_lazy_start_duration_seconds: histogram("Starts for a lease that worked, until it was ready", ACTION_BUCKETS),
};

const JOURNAL = {
  dormouse_journal_rows: gauge("Rows in the journal"),
  dormouse_journal_sequence: gauge("The number of the last row written"),
  dormouse_journal_lag_rows: gauge("Changes and notes that were told and are no row: 0, for they are written together"),
  dormouse_journal_pruned_total: counter("Rows removed as their retention was over"),
  dormouse_journal_streams: gauge("Event streams that are open"),
  dormouse_webhook_backlog: gauge("Rows that the webhook has yet to be sent", ["webhook", "host"]),
  dormouse_webhook_lag_seconds: gauge("Age of the oldest row that the webhook has yet to be sent", ["webhook", "host"]),
  dormouse_webhook_sent_total: counter("Rows that the webhook has taken", ["webhook", "host"]),
  dormouse_webhook_lost_total: counter("Rows that were pruned before the webhook was sent them", ["webhook", "host"]),
  dormouse_webhook_failed_total: counter("Attempts that the webhook did not take", ["webhook", "host"]),
};

const HTTP = {
  dormouse_http_requests_total: counter("Answers of the API", ["route", "method", "code"]),
  dormouse_http_request_duration_seconds: histogram(
    "Requests of the API; of a stream, until its headers were sent",
    REQUEST_BUCKETS,
    [
      "route",
      "method",
    ],
  ),
};

/** Every metric there is, by name. */
export const METRICS = {
  ...HOST,
  ...BUS,
  ...INSTANCES,
  ...USAGE,
  ...CONNTRACK,
  ...STANDBY,
  ...WAKE,
  ...HEALTH,
  ...RESTART,
  ...LAZY,
  ...JOURNAL,
  ...HTTP,
};
type Metrics = typeof METRICS;
export type MetricName = keyof Metrics;
export type NameOf<T extends Spec["type"]> = {
  [N in MetricName]: Metrics[N]["type"] extends T ? N : never;
}[MetricName];
/** A value for each label of the metric. */
export type LabelsOf<N extends MetricName> = Readonly<Record<Metrics[N]["labels"][number], string>>;

/** The same metrics in the order in which they are shown. */
export const GROUPS = {
  host: { title: "Host", metrics: HOST },
  bus: { title: "Hook bus", metrics: BUS },
  instances: { title: "Instances", metrics: INSTANCES },
  usage: { title: "Use by instances", metrics: USAGE },
  conntrack: { title: "Connection tracking", service: "conntrack", metrics: CONNTRACK },
  standby: { title: "Sleep", service: "conntrack-standby", metrics: STANDBY },
  wake: { title: "Wake", service: "wake", metrics: WAKE },
  health: { title: "Health", service: "health", metrics: HEALTH },
  restart: { title: "Restart", service: "restart", metrics: RESTART },
  lazy: { title: "Lazy instances", service: "lazy", metrics: LAZY },
  journal: { title: "Journal and webhooks", service: "journal", metrics: JOURNAL },
  http: { title: "HTTP API", service: "api", metrics: HTTP },
} satisfies Record<string, Group>;
export type GroupName = keyof typeof GROUPS;
