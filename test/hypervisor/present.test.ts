import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import * as v from "valibot";
import { definePlugin, type Hypervisor, type Instance, type Plugin, type State, STATES } from "../../main.ts";
import { BLANK } from "../../plugins/hypervisor/records.ts";
import { ORIGIN, registryHost } from "./scripted.ts";

const BODY = { name: "web", image: "any" };

/** A moment after every time that an instance here can have, so that nothing in a response depends on when it is made. */
const NOW = Date.UTC(2030, 0, 1);
const time = fc.integer({ min: 0, max: NOW });
const text = fc.string({ unit: "binary", maxLength: 8 });
const maybe = <T>(arbitrary: fc.Arbitrary<T>) => fc.option(arbitrary, { nil: null });
const texts = fc.dictionary(text, text, { maxKeys: 3 });
const instances: fc.Arbitrary<Instance> = fc.record({
  id: text,
  name: text,
  driver: text,
  image: text,
  entrypoint: fc.array(text, { maxLength: 2 }),
  cmd: fc.array(text, { maxLength: 2 }),
  env: texts,
  working_dir: maybe(text),
  run_as: maybe(text),
  tags: texts,
  vcpus: maybe(fc.integer({ min: 1, max: 64 })),
  memory_bytes: maybe(fc.nat()),
  hints: fc.record({ overlay_size: text, platform: text }, { requiredKeys: [] }),
  network: fc.record({ enabled: fc.boolean(), ip: maybe(text), mac: maybe(text), ip6: maybe(text) }),
  state: fc.constantFrom(...STATES),
  state_error: maybe(text),
  created_at: time,
  started_at: maybe(time),
  stopped_at: maybe(time),
  expires_at: maybe(time),
  exit_code: maybe(fc.integer()),
  exit_message: maybe(text),
  phases: fc.record({
    since: time,
    totals: fc.dictionary(fc.constantFrom(...STATES), fc.nat()) as fc.Arbitrary<Partial<Record<State, number>>>,
  }),
  policies: fc.record({ naps: fc.record({ max: fc.nat() }) }, { requiredKeys: [] }),
}).map((random) => ({ ...BLANK, ...random }));

const naps = definePlugin({
  name: "naps",
  requires: ["hypervisor"],
  setup(host) {
    host.use("hypervisor").extend({
      field: "naps",
      schema: v.object({ max: v.number() }),
      present: (instance) => ({ drowsy: instance.state === "Running" ? true : undefined }),
    });
  },
}) as Plugin;

test("presentJson() is the JSON of present() (property)", async (t) => {
  t.mock.timers.enable({ apis: ["Date"], now: NOW });
  t.after(() => t.mock.timers.reset());
  for (const plugins of [[], [naps]]) {
    const { hypervisor } = await registryHost(t, { plugins });
    const schema = hypervisor.schemas().instance;
    fc.assert(fc.property(instances, (instance) => {
      const shown = hypervisor.present(instance);
      for (let asked = 0; asked < 2; asked++) {
        assert.deepEqual(JSON.parse(hypervisor.presentJson(instance)), JSON.parse(JSON.stringify(shown)));
      }
      assert.ok(v.is(schema, JSON.parse(JSON.stringify(shown))), JSON.stringify(shown));
    }));
  }
});

test("present() shows phases that sum to the lifetime at every moment (property)", async (t) => {
  t.mock.timers.enable({ apis: ["Date"], now: NOW });
  t.after(() => t.mock.timers.reset());
  const { hypervisor } = await registryHost(t);
  const actions = ["start", "stop", "pause", "resume", "standby", "restore"] as const;
  const steps = fc.array(fc.tuple(fc.constantFrom(...actions), fc.nat(100_000)), { maxLength: 10 });
  let n = 0;
  await fc.assert(
    fc.asyncProperty(steps, async (asked) => {
      const { id } = await hypervisor.create({ ...BODY, name: `p${n++}` }, ORIGIN);
      for (const [action, ms] of asked) {
        t.mock.timers.setTime(Date.now() + ms);
        await hypervisor[action](id, ORIGIN).catch((error) => assert.equal(error.code, "invalid_state"));
        const instance = hypervisor.find(id)!;
        for (const shown of [hypervisor.present(instance), JSON.parse(hypervisor.presentJson(instance))]) {
          const spent = Object.values(shown.phase_durations_ms as Record<string, number>);
          assert.equal(spent.reduce((sum, each) => sum + each, 0), Date.now() - instance.created_at);
          assert.equal(shown.current_phase, instance.state.toLowerCase());
        }
      }
    }),
    { numRuns: 40 },
  );
});

test("presentJson() follows every change, and time", async (t) => {
  t.mock.timers.enable({ apis: ["Date"], now: NOW });
  t.after(() => t.mock.timers.reset());
  const { hypervisor } = await registryHost(t);
  const { id } = await hypervisor.create(BODY, ORIGIN);
  const shown = () => JSON.parse(hypervisor.presentJson(hypervisor.find(id)!));
  assert.deepEqual([shown().state, shown().tags, shown().phase_durations_ms.running], ["Running", {}, 0]);
  await hypervisor.update(id, { tags: { a: "b" } }, ORIGIN);
  t.mock.timers.setTime(NOW + 500);
  assert.deepEqual([shown().tags, shown().phase_durations_ms.running], [{ a: "b" }, 500]);
  await hypervisor.standby(id, ORIGIN);
  assert.deepEqual([shown().state, shown().has_snapshot, shown().phase_durations_ms.running], ["Standby", true, 500]);
});

/** Instances with ids of the test's choosing, as only a database can hold them. */
async function withIds(t: Parameters<typeof registryHost>[0], rows: [id: string, name: string][]): Promise<Hypervisor> {
  const { Records } = await import("../../plugins/hypervisor/records.ts");
  const { default: store } = await import("../../plugins/store.ts");
  const { startWith, temporaryFolder } = await import("../helpers.ts");
  const folder = temporaryFolder(t);
  const writer = definePlugin({
    name: "writer",
    requires: ["store"],
    setup(host) {
      const records = new Records(host.use("store"), host.hooks);
      for (const [id, name] of rows) {
        records.insert({ ...BLANK, id, name, driver: "scripted", state: "Stopped" }, {
          action: "create",
          origin: ORIGIN,
        });
      }
    },
  });
  const host = await startWith(t, [store, writer] as Plugin[], { folder });
  await host.close();
  return (await registryHost(t, { folder })).hypervisor;
}

test("resolve() finds by id, then by name, then by the prefix of one id", async (t) => {
  const hypervisor = await withIds(t, [
    ["abc1", "one"],
    ["abc2", "two"],
    ["xyz9", "abc"], // its name is a prefix of other ids
    ["mno5", "xyz9"], // and its name is another's id
    ["pqr7", "pqr"], // and its name is a prefix of its own
    ["pqr8", "p"],
  ]);
  const cases = [
    ["abc1", "abc1"],
    ["one", "abc1"],
    ["abc", "xyz9"],
    ["xyz9", "xyz9"],
    ["xyz", "xyz9"],
    ["mno5", "mno5"],
    ["mn", "mno5"],
    ["pqr", "pqr7"],
    ["p", "pqr8"],
  ];
  for (const [reference, id] of cases) assert.equal(hypervisor.resolve(reference).id, id, reference);
  for (const reference of ["ab", "a", "pq"]) {
    assert.throws(() => hypervisor.resolve(reference), {
      code: "ambiguous",
      message: `Cannot resolve "${reference}": 2 ids begin with it, use the full id`,
    });
  }
  for (const reference of ["", "abc12", "ABC1", "tw", "__proto__", " abc1"]) {
    assert.throws(() => hypervisor.resolve(reference), { code: "not_found", message: `No instance "${reference}"` });
  }
});
