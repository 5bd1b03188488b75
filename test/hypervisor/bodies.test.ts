import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import * as v from "valibot";
import { DormouseError } from "../../main.ts";
import { ORIGIN, registryHost } from "./scripted.ts";

const BODY = { name: "web", image: "any" };
/** As a body arrives: with `__proto__` as a key like any other, which a literal cannot say. */
const json = (text: string) => JSON.parse(text) as Record<string, unknown>;

test("create() takes the names of the contract and refuses all others with invalid_name", async (t) => {
  const { hypervisor } = await registryHost(t);
  for (const name of ["a", "0", "a-b", "a--b", "0-0", "x".repeat(63)]) {
    assert.equal((await hypervisor.create({ ...BODY, name }, ORIGIN)).name, name);
  }
  const bad = [
    "",
    "-",
    "-a",
    "a-",
    "A",
    "a_b",
    "a.b",
    "a b",
    " a",
    "a\n",
    "ä",
    "x".repeat(64),
    "a/../b",
    "\0",
    "\ud800",
  ];
  for (const name of [...bad, 1, null, true, [], {}]) {
    await assert.rejects(hypervisor.create({ ...BODY, name }, ORIGIN), { code: "invalid_name" }, JSON.stringify(name));
    await assert.rejects(hypervisor.fork("x", { name }, ORIGIN), { code: "invalid_name" }, JSON.stringify(name));
  }
  await assert.rejects(hypervisor.create({ image: "any" }, ORIGIN), {
    code: "invalid_name",
    message: /^Missing field "name"/,
  });
});

test("create() reads sizes in powers of 1024 and refuses all else with invalid_size", async (t) => {
  const { hypervisor } = await registryHost(t);
  const sizes = [["512MB", 512 * 1024 ** 2], ["1.5G", 1.5 * 1024 ** 3], ["1048576", 1048576], [
    "2 GiB",
    2 ** 31,
  ]] as const;
  for (const [size, bytes] of sizes) {
    const { id, memory_bytes } = await hypervisor.create({ ...BODY, size }, ORIGIN);
    assert.equal(memory_bytes, bytes, size);
    await hypervisor.delete(id, ORIGIN);
  }
  for (const field of ["size", "hotplug_size", "overlay_size"]) {
    for (const size of ["", "big", "-1GB", "1.0000001MB", "1e3", "NaN", "9".repeat(40), 512, null]) {
      const label = `${field}: ${JSON.stringify(size)}`;
      await assert.rejects(hypervisor.create({ ...BODY, [field]: size }, ORIGIN), { code: "invalid_size" }, label);
    }
  }
});

test("create() keeps env and tags as they are, and refuses what would be lost on the way", async (t) => {
  const { hypervisor } = await registryHost(t);
  const env = { A: "", B: "x=y", "with space": "ü\n", toString: "mine", hasOwnProperty: "too" };
  const { id } = await hypervisor.create({ ...BODY, env, tags: env }, ORIGIN);
  assert.deepEqual({ ...hypervisor.find(id)?.env }, env);
  assert.deepEqual(hypervisor.list({ tags: { toString: "mine" } }).length, 1);
  assert.deepEqual(hypervisor.list({ tags: { valueOf: "mine" } }), []);
  const bad = [
    { env: { "": "x" } },
    { env: { "a=b": "x" } },
    { env: { "a\0": "x" } },
    { env: { a: "x\0" } },
    { env: { a: 1 } },
    { env: [] },
    { env: null },
    json('{ "env": { "__proto__": "x" } }'),
    { env: { constructor: "x" } },
    { tags: { prototype: "x" } },
    { tags: { "": "x" } },
    { tags: { ["k".repeat(129)]: "x" } },
    { tags: { k: "v".repeat(257) } },
    { cmd: ["a\0"] },
    { entrypoint: "sh" },
    { image: "" },
    { image: "dir:/\0" },
    { run_as: "root\0" },
    { working_dir: "/\0" },
    { vcpus: 0 },
    { vcpus: 1.5 },
    { vcpus: 1025 },
    { network: { enabled: "yes" } },
    { network: { mac: "00:00:00:00:00:00" } },
  ];
  for (const fields of bad) {
    const body = { ...BODY, name: "other", ...fields };
    await assert.rejects(hypervisor.create(body, ORIGIN), { code: "invalid_request" }, JSON.stringify(fields));
  }
  for (const fields of bad.filter((each) => "env" in each || "tags" in each)) {
    await assert.rejects(hypervisor.update(id, fields, ORIGIN), { code: "invalid_request" }, JSON.stringify(fields));
  }
  assert.equal(hypervisor.list().length, 1);
});

test("an unknown field is refused with the nearest known one, whatever it is called", async (t) => {
  const { hypervisor } = await registryHost(t);
  const { id } = await hypervisor.create(BODY, ORIGIN);
  const other = { ...BODY, name: "other" };
  const cases = [
    [() => hypervisor.create({ ...other, enviroment: {} }, ORIGIN), 'Unknown field "enviroment"'],
    [() => hypervisor.create({ ...other, vcpu: 1 }, ORIGIN), 'Unknown field "vcpu" (did you mean "vcpus"?)'],
    [() => hypervisor.update(id, { tag: {} }, ORIGIN), 'Unknown field "tag" (did you mean "tags"?)'],
    [() => hypervisor.update(id, { name: "new" }, ORIGIN), 'Unknown field "name"'],
    [
      () => hypervisor.fork(id, { name: "copy", from_runing: true }, ORIGIN),
      'Unknown field "from_runing" (did you mean',
    ],
    [() => hypervisor.create({ ...other, constructor: 1 }, ORIGIN), 'Unknown field "constructor"'],
    [
      () => hypervisor.create({ ...json('{ "__proto__": { "image": "x" } }'), name: "other" }, ORIGIN),
      'Missing field "image"',
    ],
    [() => hypervisor.update(id, json('{ "__proto__": { "tags": {} } }'), ORIGIN), 'Unknown field "__proto__"'],
  ] as const;
  for (const [asked, message] of cases) {
    await assert.rejects(asked(), (error) => {
      assert.ok(error instanceof DormouseError && error.code === "invalid_request", String(error));
      assert.ok(error.message.startsWith(message), error.message);
      return true;
    });
  }
});

test("an error tells of a value of a megabyte no more than fits a line", async (t) => {
  const { hypervisor } = await registryHost(t);
  const huge = "x".repeat(1024 * 1024);
  for (const body of [{ [huge]: 1 }, { hypervisor: huge }, { size: huge }, { env: { [huge]: 1 } }, { name: huge }]) {
    await assert.rejects(hypervisor.create({ ...BODY, ...body }, ORIGIN), (error) => {
      assert.ok(error instanceof DormouseError && error.status === 400, String(error));
      assert.ok(error.message.length + JSON.stringify(error.details ?? {}).length < 1000, `${error.message.length}`);
      return true;
    });
  }
});

test("what the contract has and Dormouse does not is refused when it is used, and ignored when it is empty", async (t) => {
  const { hypervisor } = await registryHost(t);
  const { id } = await hypervisor.create(BODY, ORIGIN);
  for (const field of ["volumes", "devices", "gpu", "credentials", "disk_io_bps"]) {
    for (const empty of [null, "", [], {}, false, 0]) {
      await hypervisor.update(id, { [field]: empty }, ORIGIN);
    }
    for (const used of ["100MB/s", ["x"], { profile: "a" }, true, 5]) {
      const asked = hypervisor.create({ ...BODY, name: "other", [field]: used }, ORIGIN);
      await assert.rejects(asked, { code: "not_supported", message: new RegExp(`"${field}"`) }, JSON.stringify(used));
    }
  }
});

// S11: nothing that comes in or goes out is a door to what is inside.
test("create() and list() share no object with their callers", async (t) => {
  const { hypervisor } = await registryHost(t);
  const body = { ...BODY, env: { A: "1" }, tags: { t: "1" }, cmd: ["a"], network: { enabled: true } };
  const { id } = await hypervisor.create(body, ORIGIN);
  body.env.A = "2";
  body.tags.t = "2";
  body.cmd.push("b");
  const { env, tags, cmd } = hypervisor.find(id)!;
  assert.deepEqual([env, tags, cmd], [{ A: "1" }, { t: "1" }, ["a"]]);
  hypervisor.list().length = 0;
  assert.equal(hypervisor.list().length, 1);
});

// S11: each filter filters, alone and together, and none of them is more than a filter.
test("list() filters by state and by every tag", async (t) => {
  const { hypervisor } = await registryHost(t);
  const make = (name: string, tags: Record<string, string>) => hypervisor.create({ ...BODY, name, tags }, ORIGIN);
  const { id } = await make("a", { team: "x", env: "dev" });
  await make("b", { team: "x" });
  await make("c", {});
  await hypervisor.stop(id, ORIGIN);
  const names = (filter?: Parameters<typeof hypervisor.list>[0]) => hypervisor.list(filter).map(({ name }) => name);
  assert.deepEqual(names(), ["a", "b", "c"]);
  assert.deepEqual(names({}), ["a", "b", "c"]);
  assert.deepEqual(names({ state: "Stopped" }), ["a"]);
  assert.deepEqual(names({ tags: { team: "x" } }), ["a", "b"]);
  assert.deepEqual(names({ tags: { team: "x", env: "dev" } }), ["a"]);
  assert.deepEqual(names({ state: "Running", tags: { team: "x" } }), ["b"]);
  assert.deepEqual(names({ tags: { team: "" } }), []);
});

test("no body does more than be refused with a 4xx code (property)", async (t) => {
  const { hypervisor } = await registryHost(t);
  const { id } = await hypervisor.create(BODY, ORIGIN);
  const known = Object.keys((hypervisor.schemas().create as unknown as { entries: object }).entries);
  const key = fc.oneof(
    fc.constantFrom(...known, "gpu", "volumes", "wake", "health_check", "__proto__", "constructor", "prototype"),
    fc.string({ unit: "binary" }),
  );
  const leaf = fc.oneof(
    fc.string({ unit: "binary" }),
    fc.constantFrom("\ud800", "\0", "1h", "0s", "-0", "512MB", "2999-01-01T00:00:00Z", "x".repeat(70_000)),
    fc.double(),
    fc.constantFrom(null, true, false, 1e308, -1),
  );
  const { tree } = fc.letrec((tie) => ({
    tree: fc.oneof(
      { maxDepth: 3 },
      leaf,
      fc.array(tie("tree"), { maxLength: 3 }),
      fc.array(fc.tuple(key, tie("tree")), { maxLength: 4 }).map(own),
    ),
  }));
  const body = fc.oneof(
    tree,
    fc.array(fc.tuple(key, tree), { maxLength: 5 }).map((e) => own([...Object.entries(BODY), ...e])),
  );
  const shape = Object.getOwnPropertyNames(Object.prototype).length;
  await fc.assert(
    fc.asyncProperty(body, async (body) => {
      const asked = [
        hypervisor.create(body, ORIGIN).then((made) => hypervisor.delete(made.id, ORIGIN)),
        hypervisor.update(id, body, ORIGIN),
        hypervisor.fork(id, body, ORIGIN),
      ];
      for (const result of await Promise.allSettled(asked)) {
        if (result.status === "fulfilled") continue;
        const error: unknown = result.reason;
        assert.ok(error instanceof DormouseError, String(error));
        assert.ok(
          (error.status >= 400 && error.status < 500) || error.code === "not_supported",
          `${error.status} ${error}`,
        );
      }
      assert.equal(hypervisor.list().length, 1);
      JSON.parse(hypervisor.presentJson(hypervisor.find(id)!));
    }),
    { numRuns: 300 },
  );
  assert.equal(Object.getOwnPropertyNames(Object.prototype).length, shape);
});

/** An object with exactly these own keys, `__proto__` too. */
function own(entries: [string, unknown][]): Record<string, unknown> {
  const result: Record<string, unknown> = {};
  for (const [key, value] of entries) {
    Object.defineProperty(result, key, { value, enumerable: true, configurable: true, writable: true });
  }
  return result;
}

test("a list in the place of a field's object is refused with the field's code, and changes nothing", async (t) => {
  const { hypervisor } = await registryHost(t);
  const schema = v.strictObject({ depth: v.optional(v.number(), 3) });
  const field = hypervisor.extend({ field: "lazy", code: "invalid_lazy", schema });
  const made = await hypervisor.create({ name: "web", image: "any", lazy: { depth: 7 } }, ORIGIN);
  await assert.rejects(hypervisor.update(made.id, { lazy: [] }, ORIGIN), {
    code: "invalid_lazy",
    message: /found an array/,
  });
  await assert.rejects(hypervisor.create({ name: "other", image: "any", lazy: [] }, ORIGIN), { code: "invalid_lazy" });
  assert.deepEqual(field.policy(hypervisor.find(made.id)!), { depth: 7 });
});
