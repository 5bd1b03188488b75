/** What the tests of health share: the real registry, store and plugin, on a clock and a driver that do as the test says. */
import type { TestContext } from "node:test";
import {
  definePlugin,
  type ExecRequest,
  type ExecResult,
  type Feature,
  type Health,
  type HealthChange,
  type HealthProbed,
  type Instance,
  type Note,
  type Plugin,
} from "../../main.ts";
import { healthPlugin } from "../../plugins/health/mod.ts";
import type { Clock } from "../../plugins/shared/clock.ts";
import { ManualClock } from "../clock.ts";
import { type Fixture, ORIGIN, registryHost, ScriptedDriver } from "../hypervisor/scripted.ts";

/** Passes where nothing else is said. */
export class ExaminedDriver extends ScriptedDriver {
  /** What a command of a check leads to: its exit code, or what it waits for. */
  answer: (instance: Instance, request: ExecRequest) => number | Promise<number> = () => 0;
  readonly execs: string[] = [];

  constructor(machines?: ScriptedDriver["machines"]) {
    super(machines);
    (this.features as Set<Feature>).add("exec");
  }

  exec = async (instance: Instance, request: ExecRequest): Promise<ExecResult> => {
    this.execs.push(instance.name);
    const exit_code = await this.answer(instance, request);
    return { exit_code, stdout: "", stderr: exit_code === 0 ? "" : "broken\n", timed_out: false, truncated: false };
  };
}

export interface World<C extends Clock> extends Omit<Fixture, "driver"> {
  driver: ExaminedDriver;
  clock: C;
  health: Health;
  notes: Note[];
  changes: HealthChange[];
  probed: HealthProbed[];
  /** A running instance with a check: a command every 10s, without a start period, where nothing else is said. */
  make(name?: string, health_check?: Record<string, unknown>): Promise<Instance>;
  /** As the API shows it. */
  status(id: string): Record<string, unknown>;
  /** The changes so far, as `from to`. */
  said(): string[];
  /** Resolves with the next probe that ends after this call. */
  probe(): Promise<HealthProbed>;
}

export interface WorldOptions<C extends Clock> {
  clock?: C;
  driver?: ExaminedDriver;
  folder?: string;
  plugins?: Plugin[];
  /** The `[plugins.health]` table. */
  table?: Record<string, unknown>;
  /** Of the delay of first probes; none where nothing is said. */
  random?: () => number;
}

export async function world<C extends Clock = ManualClock>(
  t: TestContext,
  options: WorldOptions<C> = {},
): Promise<World<C>> {
  const { driver = new ExaminedDriver(), table = {}, random = () => 0, plugins = [] } = options;
  const clock = options.clock ?? new ManualClock() as unknown as C;
  const [notes, changes, probed] = [[] as Note[], [] as HealthChange[], [] as HealthProbed[]];
  let waiting: ((probe: HealthProbed) => void)[] = [];
  const listener = definePlugin({
    name: "listener",
    requires: ["health"],
    setup({ hooks }) {
      const buffer = 100_000;
      hooks.on("note:event", (note) => void notes.push(note), { buffer });
      hooks.on("health:changed", (change) => void changes.push(change), { buffer });
      hooks.on("health:probed", (probe) => {
        probed.push(probe);
        for (const resolve of waiting.splice(0)) resolve(probe);
      }, { buffer });
    },
  });
  const fixture = await registryHost(t, {
    driver,
    plugins: [...plugins, healthPlugin(clock, random) as Plugin, listener as Plugin],
    // Its look at the driver goes by the real clock, which has no place in a story that a test tells.
    table: { reconcile_interval: "1h" },
    tables: { health: table },
    ...(options.folder && { folder: options.folder }),
  });
  const { hypervisor, host } = fixture;
  return {
    ...fixture,
    driver,
    clock,
    health: host.use("health"),
    notes,
    changes,
    probed,
    make: (name = "web", health_check = {}) => {
      const check = { exec: { command: ["check"] }, start_period: "0s", ...health_check };
      return hypervisor.create({ name, image: "any", health_check: check }, ORIGIN);
    },
    status: (id) => hypervisor.present(hypervisor.find(id)!).health_status as Record<string, unknown>,
    said: () => changes.map(({ from, to }) => `${from} ${to}`),
    probe: () => new Promise((resolve) => waiting = [...waiting, resolve]),
  };
}
