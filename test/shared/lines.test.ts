import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { test } from "node:test";
import fc from "fast-check";
import { Lines } from "../../plugins/shared/lines.ts";

function cut(chunks: Buffer[], max: number): string[] {
  const lines = new Lines(max);
  return [...chunks.flatMap((chunk) => [...lines.push(chunk)]), ...lines.end()];
}

test("Lines gives the lines of a text, however its bytes arrive", () => {
  fc.assert(fc.property(
    fc.array(fc.string({ unit: "grapheme" }).filter((line) => !line.includes("\n"))),
    fc.array(fc.nat(200)),
    (expected, cuts) => {
      const bytes = Buffer.from(expected.map((line) => `${line}\n`).join(""));
      const at = [0, ...cuts.map((cut) => cut % (bytes.length + 1)).sort((a, b) => a - b), bytes.length];
      const chunks = at.slice(1).map((end, i) => bytes.subarray(at[i], end));
      assert.deepEqual(cut(chunks, 10_000), expected);
    },
  ));
});

// E9: a long line is neither lost nor does it end the stream.
test("Lines splits a line beyond the limit into pieces that make it up again, and never inside a character", () => {
  fc.assert(fc.property(
    fc.string({ unit: "grapheme", minLength: 1, maxLength: 200 }).filter((line) => !line.includes("\n")),
    fc.integer({ min: 4, max: 20 }),
    fc.integer({ min: 1, max: 30 }),
    (line, max, step) => {
      const bytes = Buffer.from(`${line}\nnext\n`);
      const chunks = Array.from(
        { length: Math.ceil(bytes.length / step) },
        (_, i) => bytes.subarray(i * step, (i + 1) * step),
      );
      const pieces = cut(chunks, max);
      assert.equal(pieces.join(""), `${line}next`);
      assert.equal(pieces.at(-1), "next");
      for (const piece of pieces) assert(Buffer.byteLength(piece) <= max, `${piece} is over ${max} bytes`);
    },
  ));
});

test("Lines replaces what is not UTF-8 and keeps the last line without a newline", () => {
  assert.deepEqual(cut([Buffer.from([0x61, 0xff, 0x62, 10, 0x63])], 100), ["a\u{fffd}b", "c"]);
  assert.deepEqual(cut([Buffer.alloc(10, 0x80)], 4).join("").length, 10);
});
