import assert from "node:assert/strict";
import { test } from "node:test";
import { flow, world } from "./world.ts";

// I22: connections count, not bytes; an instance whose idle ones are not to hold it up says which it means.
test("an idle connection holds an instance up for a day, unless its policy leaves it out", async (t) => {
  const { instance, clock, kernel, state } = await world(t);
  const policy = { enabled: true, idle_timeout: "10s" };
  const held = await instance("held", policy);
  const port = await instance("port", { ...policy, ignore_destination_ports: [8080] });
  const source = await instance("source", { ...policy, ignore_source_cidrs: ["192.0.2.0/24"] });
  for (const { network } of [held, port, source]) {
    kernel.set(flow({ destination: network.ip!, destination_port: 8080 }));
  }
  await clock.pass(86_400_000);
  assert.deepEqual([held, port, source].map(({ id }) => state(id)), ["Running", "Standby", "Standby"]);
});
