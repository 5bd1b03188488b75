import assert from "node:assert/strict";
import { it } from "node:test";
import fc from "fast-check";
import { didYouMean, nearest } from "../../plugins/shared/nearest.ts";

it("nearest() finds the candidate that a slip of the finger missed, and nothing far away", () => {
  const candidates = ["listen", "tokens", "api", "hypervisor", "conntrack-standby"];
  const cases: [string, string | undefined][] = [
    ["lisen", "listen"],
    ["LISTEN", "listen"],
    ["token", "tokens"],
    ["apo", "api"],
    ["hypervizor", "hypervisor"],
    ["conntrack_standby", "conntrack-standby"],
    ["network", undefined],
    ["", undefined],
    ["xyz", undefined],
  ];
  for (const [word, expected] of cases) assert.equal(nearest(word, candidates), expected, word);
  assert.equal(didYouMean("lisen", candidates), ' (did you mean "listen"?)');
  assert.equal(didYouMean("xyz", candidates), "");
  assert.equal(didYouMean("x", []), "");
});

it("nearest() always finds a candidate itself, and one that lacks a letter of a longer word", () => {
  const word = fc.stringMatching(/^[a-z]{4,12}$/);
  fc.assert(fc.property(word, fc.array(word), (w, others) => assert.equal(nearest(w, [...others, w]), w)));
  fc.assert(fc.property(word, fc.nat(3), (w, i) => assert.equal(nearest(w.slice(0, i) + w.slice(i + 1), [w]), w)));
});
