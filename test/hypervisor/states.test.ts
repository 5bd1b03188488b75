import assert from "node:assert/strict";
import { test } from "node:test";
import { STATES } from "../../main.ts";
import { Lanes } from "../../plugins/hypervisor/lanes.ts";
import { LIVE, OUTCOME, OVERTAKES, RULES, TERMINAL, UNDER_WAY } from "../../plugins/hypervisor/states.ts";

test("the rules decide every request in every state", () => {
  for (const [request, row] of Object.entries(RULES)) {
    assert.deepEqual(Object.keys(row).sort(), [...STATES].sort(), request);
  }
  for (const table of [LIVE, TERMINAL]) assert.deepEqual(Object.keys(table).sort(), [...STATES].sort());
  for (const table of [UNDER_WAY, OUTCOME, OVERTAKES]) assert.deepEqual(Object.keys(table), Object.keys(RULES));
});

test("a request whose outcome is reached is done, never carried out again", () => {
  for (const [request, outcome] of Object.entries(OUTCOME)) {
    if (outcome !== null) assert.equal(RULES[request as keyof typeof OUTCOME][outcome], "done", request);
  }
});

test("nothing but a deletion or an update acts on Unknown", () => {
  const acting = Object.entries(RULES).filter(([, row]) => row.Unknown !== "refuse").map(([request]) => request);
  assert.deepEqual(acting, ["update", "delete"]);
});

test("enter() runs turns one at a time in order, whether they fail or not", async () => {
  const lanes = new Lanes();
  const order: string[] = [];
  const turn = (name: string, fail = false) => async () => {
    order.push(`${name} begins`);
    await Promise.resolve();
    order.push(`${name} ends`);
    if (fail) throw new Error(name);
    return name;
  };
  const results = await Promise.allSettled([
    lanes.enter("i", "update", turn("a"), { joins: false }),
    lanes.enter("i", "update", turn("b", true), { joins: false }),
    lanes.enter("i", "start", turn("c")),
  ]);
  assert.deepEqual(order, ["a begins", "a ends", "b begins", "b ends", "c begins", "c ends"]);
  assert.deepEqual(results.map(({ status }) => status), ["fulfilled", "rejected", "fulfilled"]);
  assert.deepEqual(lanes.pending("i"), []);
});

test("enter() lets a look join one that waits, but not one that reads already", async () => {
  const lanes = new Lanes();
  let reads = 0;
  const look = () => lanes.enter("i", "look", async () => ++reads);
  const first = look();
  const rest = [look(), look(), look()];
  assert.equal(await first, 1);
  assert.deepEqual(await Promise.all(rest), [2, 2, 2]);
});

test("close() waits for turns under way and refuses new ones", async () => {
  const lanes = new Lanes();
  const gate = Promise.withResolvers<string>();
  const running = lanes.enter("i", "start", () => gate.promise);
  const closing = lanes.close();
  await assert.rejects(lanes.enter("j", "start", async () => "late"), { code: "shutting_down" });
  gate.resolve("done");
  await closing;
  assert.equal(await running, "done");
});
