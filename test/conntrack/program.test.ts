import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { WatchedAddresses } from "../../plugins/conntrack/addresses.ts";
import { Splitter } from "../../plugins/conntrack/line.ts";
import { DATAGRAMS, LINES, readDatagrams, readLines, TABLE_LINES } from "./captured.ts";

const DIRECTIONS = "src=10.0.0.1 dst=10.0.0.2 sport=1 dport=2 src=10.0.0.2 dst=10.0.0.1 sport=2 dport=1";
const FLOW = { source: "10.0.0.1", source_port: 1, destination: "10.0.0.2", destination_port: 2 };

test("LineReader makes of the program's lines what MessageReader makes of the same history", () => {
  const { told, counts } = readLines(LINES);
  assert.deepEqual(told, readDatagrams(DATAGRAMS).told);
  assert.equal(told.length, 23);
  assert.deepEqual(counts, { messages: 25, skipped: 2, malformed: 0 });
});

test("LineReader reads a table", () => {
  const { told, counts } = readLines(TABLE_LINES);
  assert.deepEqual(told.map(([, { state }]) => state), ["TIME_WAIT", "TIME_WAIT", "TIME_WAIT", ""]);
  assert.deepEqual(counts, { messages: 5, skipped: 1, malformed: 0 });
});

test("LineReader passes over what is not for a watched address", () => {
  const watched = new WatchedAddresses(["0::1"]);
  const { told, counts } = readLines(LINES, watched);
  assert.equal(told.length, 6);
  assert.ok(told.every(([, { destination }]) => destination === "0::1"));
  assert.deepEqual(counts, { messages: 25, skipped: 19, malformed: 0 });
  watched.delete("::1");
  assert.equal(readLines(LINES, watched).told.length, 0);
});

test("LineReader reads the forms that other versions and settings have", () => {
  const forms: [line: string, kind: string, protocol: string, state: string][] = [
    [`[DESTROY] tcp      6 ${DIRECTIONS} [ASSURED]`, "destroy", "tcp", ""],
    [` [UPDATE] tcp      6 ${DIRECTIONS} [OFFLOAD] mark=0`, "update", "tcp", ""],
    [`tcp      6 9 SYN_SENT2 ${DIRECTIONS} use=1`, "update", "tcp", "SYN_SENT2"],
    [`udp      17 9 ${DIRECTIONS} [UNREPLIED] id=1`, "update", "udp", ""],
    [
      "    [NEW] tcp 6 120 SYN_SENT src=10.0.0.1 dst=9.9.9.9 sport=1 dport=80 packets=1 bytes=60 [UNREPLIED] " +
      "src=10.0.0.2 dst=10.0.0.1 sport=2 dport=1 packets=0 bytes=0 mark=7 zone=3",
      "new",
      "tcp",
      "SYN_SENT",
    ],
  ];
  for (const [line, kind, protocol, state] of forms) {
    assert.deepEqual(readLines([line]).told, [[kind, { ...FLOW, protocol, state }]], line);
  }
});

test("LineReader counts what it cannot read", () => {
  const lines = [
    "",
    "conntrack v1.4.7 (conntrack-tools): 4 flow entries have been shown.",
    "[NEW] tcp 6 120 SYN_SENT src=10.0.0.1 dst=10.0.0.2 sport=1 dport=2",
    `[BORN] tcp 6 120 SYN_SENT ${DIRECTIONS}`,
    `[NEW] tcp six 120 SYN_SENT ${DIRECTIONS}`,
    `[NEW] tcp 6 120 syn_sent ${DIRECTIONS}`,
    `[NEW] tcp 6 120 SYN_SENT ${DIRECTIONS.replace("10.0.0.1", "10.0.0.256")}`,
    `[NEW] tcp 6 120 SYN_SENT ${DIRECTIONS.replace("src=10.0.0.2", "src=")}`,
    `[NEW] tcp 6 120 SYN_SENT ${DIRECTIONS.replaceAll("sport=1 ", "sport=65536 ")}`,
    `[NEW] tcp 6 120 SYN_SENT ${DIRECTIONS.replace("sport=1 ", "")}`,
    `[NEW] tcp 6 120 SYN_SENT ${DIRECTIONS.replace("sport=2 ", "sport= ")}`,
  ];
  for (const line of lines) {
    const { told, counts } = readLines([line]);
    assert.deepEqual([told, counts], [[], { messages: 1, skipped: 0, malformed: 1 }], line);
  }
});

test("LineReader survives anything", () => {
  const words = fc.constantFrom(
    "src=",
    " src=",
    "10.0.0.2",
    "::1",
    "fe80::1%eth0",
    "sport=",
    " sport=80",
    "[NEW]",
    "tcp 6 ",
  );
  const glued = fc.array(fc.oneof(words, fc.string()), { maxLength: 12 }).map((parts) => parts.join(""));
  const mutated = fc.tuple(fc.constantFrom(...LINES), fc.nat(300), fc.nat(20), fc.string()).map((
    [line, at, cut, text],
  ) => line.slice(0, at) + text + line.slice(at + cut));
  const watched = new WatchedAddresses(["10.0.0.2", "127.0.0.2", "::1"]);
  fc.assert(
    fc.property(fc.oneof(fc.string(), glued, mutated), fc.boolean(), (line, all) => {
      const { told, counts } = readLines([line], all ? undefined : watched);
      assert.equal(told.length + counts.skipped + counts.malformed, 1);
    }),
    { numRuns: 3_000 },
  );
});

test("Splitter cuts the same lines wherever the text is cut", () => {
  const text = `${LINES.join("\n")}\nrest`;
  fc.assert(
    fc.property(fc.array(fc.nat(text.length), { maxLength: 20 }), (cuts) => {
      const lines: string[] = [];
      const splitter = new Splitter();
      let from = 0;
      for (const cut of [...cuts.sort((a, b) => a - b), text.length]) {
        splitter.push(text.slice(from, cut), (line) => void lines.push(line));
        from = Math.max(from, cut);
      }
      splitter.end((line) => void lines.push(line));
      assert.deepEqual(lines, [...LINES, "rest"]);
    }),
    { numRuns: 200 },
  );
});

test("Splitter gives up a line that never ends", () => {
  const lines: string[] = [];
  const splitter = new Splitter();
  for (let i = 0; i < 100; i++) splitter.push("x".repeat(1024), (line) => void lines.push(line));
  assert.equal(lines.length, 1);
});
