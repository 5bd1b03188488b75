/** What the registry tells beside its changes: notes, actions that are done, and those that had nothing to do. */
import assert from "node:assert/strict";
import { test, type TestContext } from "node:test";
import { type ActionDone, definePlugin, type Fulfilled, type Host, type Note, type Plugin } from "../../main.ts";
import { temporaryFolder } from "../helpers.ts";
import { gate, ORIGIN, registryHost, ScriptedDriver } from "./scripted.ts";

const BODY = { name: "web", image: "any" };
const DRAFT = { type: "weather:rain", origin: { actor: "sky", cause: "clouds" }, summary: "It rains" };

/** Declares a type of note, and keeps all that it is told. */
function listener() {
  const heard = {
    committed: [] as Note[],
    notes: [] as Note[],
    done: [] as ActionDone[],
    fulfilled: [] as Fulfilled[],
  };
  let host: Host | undefined;
  const plugin = definePlugin({
    name: "listener",
    requires: ["hypervisor", "store"],
    setup(own) {
      host = own;
      own.use("hypervisor").declareNotes({ "weather:rain": { help: "It rains", event: "rain.began" } });
      own.hooks.commit("note:commit", (note) => void heard.committed.push(note));
      own.hooks.on("note:event", (note) => void heard.notes.push(note));
      own.hooks.on("action:done", (done) => void heard.done.push(done));
      own.hooks.guard("action:fulfilled", (request) => void heard.fulfilled.push(request));
    },
  });
  return { plugin: plugin as Plugin, heard, host: () => host! };
}

const turn = () => new Promise<void>((resolve) => setImmediate(resolve));

test("note() takes the next number of the changes' own sequence, with what is written along with it", async (t) => {
  const { plugin, heard, host } = listener();
  const { hypervisor, events } = await registryHost(t, { plugins: [plugin] });
  const { id } = await hypervisor.create(BODY, ORIGIN);
  const { db } = host().use("store");
  db.exec("CREATE TABLE rain (drops INTEGER) STRICT");
  const write = () => void db.exec("INSERT INTO rain VALUES (7)");
  const note = hypervisor.note(id, { ...DRAFT, detail: { drops: 7 } }, write)!;
  await hypervisor.stop(id, ORIGIN);
  await turn();
  const before = events.findLast(({ seq }) => seq < note.seq)!;
  const after = events.find(({ seq }) => seq > note.seq)!;
  assert.deepEqual([before.seq, after.seq], [note.seq - 1, note.seq + 1]);
  const { type, event, actor, cause, summary, detail, instance_id } = note;
  assert.deepEqual([type, event, actor, cause, summary], ["weather:rain", "rain.began", "sky", "clouds", "It rains"]);
  assert.deepEqual([detail, instance_id], [{ drops: 7 }, id]);
  assert.deepEqual([heard.committed, heard.notes], [[note], [note]]);
  assert.deepEqual({ ...db.prepare("SELECT drops FROM rain").get() }, { drops: 7 });
});

test("note() that fails leaves nothing behind, not even in memory, and its number is given to the next", async (t) => {
  const { plugin, heard, host } = listener();
  const { hypervisor } = await registryHost(t, { plugins: [plugin] });
  const { id } = await hypervisor.create(BODY, ORIGIN);
  const field = hypervisor.extend<never, number>({ field: "rain", schema: undefined as never });
  field.save(id, 1);
  const wet = () => {
    field.save(id, 2);
    throw new Error("too wet");
  };
  assert.throws(() => hypervisor.note(id, DRAFT, wet), /too wet/);
  assert.equal(field.runtime(id), 1);
  const row = host().use("store").db.prepare("SELECT body FROM runtimes WHERE field = 'rain'").get();
  assert.equal(row?.body, "1");
  const first = hypervisor.note(id, DRAFT)!;
  const second = hypervisor.note(id, DRAFT)!;
  assert.equal(second.seq, first.seq + 1);
  await turn();
  assert.deepEqual(heard.notes.map(({ seq }) => seq), [first.seq, second.seq]);
});

test("note() refuses what nobody has declared, and what comes in the middle of a change", async (t) => {
  const { plugin, host } = listener();
  const { hypervisor } = await registryHost(t, { plugins: [plugin] });
  const { id } = await hypervisor.create(BODY, ORIGIN);
  assert.throws(() => hypervisor.note(id, { ...DRAFT, type: "weather:snow" }), /nobody has declared/);
  assert.throws(() => hypervisor.declareNotes({ "weather:rain": { help: "Again" } }), /is taken/);
  assert.equal(hypervisor.note("gone", DRAFT), undefined);
  const caught: unknown[] = [];
  host().hooks.commit("instance:commit", () => {
    try {
      hypervisor.note(id, DRAFT);
    } catch (error) {
      caught.push(error);
    }
  });
  await hypervisor.stop(id, ORIGIN);
  assert.match(String(caught[0]), /TypeError: Cannot change or note anything from within a change/);
});

test("the sequence goes on after a restart where it stood, notes counted", async (t) => {
  const [folder, driver, { plugin }] = [temporaryFolder(t), new ScriptedDriver(), listener()];
  const first = await registryHost(t, { folder, driver, plugins: [plugin] });
  const { id } = await first.hypervisor.create(BODY, ORIGIN);
  const { seq } = first.hypervisor.note(id, DRAFT)!;
  await first.host.close();
  const second = await registryHost(t, { folder, driver, plugins: [listener().plugin] });
  assert.equal(second.hypervisor.note(id, DRAFT)!.seq, seq + 1);
});

test("action:done tells each action once, with its driver, result and time", async (t: TestContext) => {
  const { plugin, heard, host } = listener();
  const { hypervisor, driver } = await registryHost(t, { plugins: [plugin] });
  const { id } = await hypervisor.create(BODY, ORIGIN);
  await Promise.all([hypervisor.standby(id, ORIGIN), hypervisor.standby(id, ORIGIN)]);
  await hypervisor.standby(id, ORIGIN);
  driver.script.restore = () => Promise.reject(new Error("no memory"));
  await assert.rejects(hypervisor.restore(id, ORIGIN), /no memory/);
  delete driver.script.restore;
  await hypervisor.restore(id, ORIGIN);
  const { arrived, open, script } = gate();
  driver.script.standby = script;
  const overtaken = assert.rejects(hypervisor.standby(id, ORIGIN), { code: "aborted" });
  await arrived;
  await hypervisor.restore(id, ORIGIN);
  await overtaken;
  open();
  const veto = host().hooks.guard("before:stop", () => {
    throw host().veto("busy", "it is busy");
  });
  await assert.rejects(hypervisor.stop(id, ORIGIN), { code: "vetoed" });
  veto[Symbol.dispose]();
  await hypervisor.update(id, { tags: { a: "b" } }, ORIGIN);
  await hypervisor.delete(id, ORIGIN);
  await turn();
  assert.deepEqual(heard.done.map(({ action, result }) => `${action} ${result}`), [
    "create ok",
    "standby ok",
    "restore failed",
    "restore ok",
    "standby aborted",
    "stop refused",
    "update ok",
    "delete ok",
  ]);
  for (const done of heard.done) {
    assert.ok(done.duration_ms >= 0);
    assert.deepEqual([done.instance_id, done.driver, done.actor], [id, "scripted", "test"]);
  }
});

test("action:fulfilled is asked under the lock where there is nothing to do, and can refuse", async (t) => {
  const { plugin, heard, host } = listener();
  const { hypervisor, events } = await registryHost(t, { plugins: [plugin] });
  const { id } = await hypervisor.create(BODY, ORIGIN);
  await hypervisor.stop(id, ORIGIN);
  assert.equal(heard.fulfilled.length, 0);
  await turn();
  const count = events.length;
  await hypervisor.stop(id, { actor: "somebody", cause: "request" });
  assert.deepEqual(heard.fulfilled.map(({ action, instance, origin }) => [action, instance.state, origin.actor]), [
    ["stop", "Stopped", "somebody"],
  ]);
  await turn();
  assert.equal(events.length, count);
  host().hooks.guard("action:fulfilled", () => {
    throw host().veto("no", "not today");
  });
  await assert.rejects(hypervisor.stop(id, ORIGIN), { code: "vetoed" });
});
