import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import ipaddr from "ipaddr.js";
import { AddressTexts, WatchedAddresses } from "../../plugins/conntrack/addresses.ts";
import { Backoff } from "../../plugins/conntrack/backoff.ts";
import { type DumpEnd, dumpRequest } from "../../plugins/conntrack/message.ts";
import { DATAGRAMS, readDatagrams, readLines, TABLE_DATAGRAMS, TABLE_LINES } from "./captured.ts";

const WEB = { protocol: "tcp", source: "127.0.0.1", source_port: 57448 };
const FIRST = DATAGRAMS[0];
const PUBLISHED = { ...WEB, source_port: 49704, destination: "127.0.0.2", destination_port: 8008 };

/** The message, changed by `change`. */
function changed(message: Uint8Array, change: (view: DataView) => void): Uint8Array {
  const copy = message.slice();
  change(new DataView(copy.buffer));
  return copy;
}

test("MessageReader reads the kernel's own messages", () => {
  const { told, counts } = readDatagrams(DATAGRAMS);
  assert.deepEqual(told[0], ["new", { ...WEB, destination: "127.0.0.2", destination_port: 8008, state: "SYN_SENT" }]);
  const states = told.filter(([, flow]) => flow.source_port === WEB.source_port).map(([kind, { state }]) =>
    `${kind} ${state}`
  );
  assert.deepEqual(states, [
    "new SYN_SENT",
    "update SYN_RECV",
    "update ESTABLISHED",
    "update FIN_WAIT",
    "update LAST_ACK",
    "update TIME_WAIT",
  ]);
  const six = told.filter(([, { destination }]) => destination === "::1");
  assert.equal(six.length, 6);
  assert.deepEqual(six[0][1], {
    ...{ protocol: "tcp", source: "::1", source_port: 50032, destination: "::1", destination_port: 8008 },
    state: "SYN_SENT",
  });
  const udp = told.filter(([, { protocol }]) => protocol === "udp").map(([kind, { state }]) => [kind, state]);
  assert.deepEqual(udp, [["new", ""]]);
  assert.deepEqual(counts, { messages: 25, skipped: 2, malformed: 0 }, "the ping is no flow");
});

test("MessageReader tells who answers when the kernel rewrote the destination", () => {
  const { told } = readDatagrams(DATAGRAMS);
  const published = told.filter(([, flow]) => flow.source_port === PUBLISHED.source_port);
  assert.equal(published.length, 8);
  for (const [, { state: _, ...flow }] of published) assert.deepEqual(flow, PUBLISHED);
  assert.deepEqual(published.at(-1)![0], "destroy");
});

test("MessageReader reads a whole table and its end", () => {
  const dump: DumpEnd = { done: false, interrupted: false, error: 0 };
  const { told, counts } = readDatagrams(TABLE_DATAGRAMS, { dump });
  assert.deepEqual(told.map(([, flow]) => flow), readLines(TABLE_LINES).told.map(([, flow]) => flow));
  assert.equal(told.length, 4);
  assert.equal(counts.malformed, 0);
  assert.equal(dump.done, true);
  assert.equal(Math.abs(dump.error), 0);
  assert.equal(dump.interrupted, false);
});

test("MessageReader passes over what is not for a watched address", () => {
  const watched = new WatchedAddresses(["0:0:0:0:0:0:0:1", "10.0.0.1"]);
  const { told, counts } = readDatagrams(DATAGRAMS, { watched });
  assert.equal(told.length, 6);
  assert.ok(told.every(([, { destination }]) => destination === "0:0:0:0:0:0:0:1"), "spelled as it was watched");
  assert.deepEqual(counts, { messages: 25, skipped: 19, malformed: 0 });
});

test("WatchedAddresses holds from one message to the next", () => {
  const watched = new WatchedAddresses();
  assert.equal(readDatagrams(DATAGRAMS, { watched }).told.length, 0);
  watched.add("127.0.0.2");
  assert.equal(readDatagrams(DATAGRAMS, { watched }).told.length, 14);
  watched.add("::1");
  assert.equal(watched.size, 2);
  watched.delete("127.0.0.2");
  watched.delete("0::1");
  assert.equal(watched.size, 0);
  assert.equal(readDatagrams(DATAGRAMS, { watched }).told.length, 0);
  assert.throws(() => watched.add("web"));
});

test("AddressTexts at() agrees with ipaddr.js on every address", () => {
  const bytes = (length: number) =>
    fc.array(fc.integer({ min: 0, max: 255 }), { minLength: length, maxLength: length });
  const zeros = fc.tuple(bytes(3), bytes(3)).map(([head, tail]) => [...head, ...Array<number>(10).fill(0), ...tail]);
  const surrogates = [0x20, 1, 0xd8, 0, 0xdc, 0, 0xdb, 0xff, 0xdf, 0xff, 0, 0, 0, 0, 0, 1];
  fc.assert(
    fc.property(fc.oneof(bytes(4), bytes(16), zeros), (all) => {
      const view = new DataView(Uint8Array.from(all).buffer);
      const family = all.length === 4 ? 4 : 6;
      const text = new AddressTexts().at(view, 0, family);
      assert.equal(text, ipaddr.fromByteArray(all).toString());
      assert.equal(new WatchedAddresses([text]).at(view, 0, family), text);
    }),
    { numRuns: 1_000, examples: [[surrogates]] },
  );
});

// I2: a state that has no name here must reach those who decide.
test("MessageReader names states beyond the known ones", () => {
  // The state's value is 4 bytes behind the only attribute header of length 5 and type 1 inside CTA_PROTOINFO_TCP.
  const at = FIRST.findIndex((_, i) => FIRST.slice(i, i + 8).join() === "44,0,1,128,5,0,1,0") + 8;
  for (const [number, state] of [[9, "SYN_SENT2"], [10, "UNKNOWN_10"], [255, "UNKNOWN_255"], [0, "NONE"]] as const) {
    const { told } = readDatagrams([changed(FIRST, (view) => view.setUint8(at, number))]);
    assert.equal(told[0][1].state, state);
  }
});

test("MessageReader tells no state where the message has none", () => {
  const at = FIRST.findIndex((_, i) => FIRST.slice(i, i + 4).join() === "48,0,4,128");
  const { told } = readDatagrams([changed(FIRST, (view) => view.setUint16(at + 2, 99, true))]);
  assert.equal(told[0][1].state, "");
});

test("MessageReader counts a message that is cut off, at every length", () => {
  for (let length = 1; length < FIRST.length; length++) {
    const { told, counts } = readDatagrams([FIRST.subarray(0, length)]);
    assert.deepEqual([told.length, counts], [0, { messages: 1, skipped: 0, malformed: 1 }], `${length} bytes`);
  }
});

test("MessageReader counts a message whose own length was cut, and reads the next", () => {
  for (let length = 16; length < FIRST.length; length += 4) {
    const short = changed(FIRST.subarray(0, length), (view) => view.setUint32(0, length, true));
    const { told, counts } = readDatagrams([Uint8Array.from([...short, ...DATAGRAMS[1]])]);
    assert.equal(told.at(-1)?.[1].state, "SYN_RECV", `${length} bytes`);
    assert.equal(counts.messages, 2);
    assert.equal(told.length + counts.malformed, 2, `${length} bytes`);
  }
});

test("MessageReader ends at attributes without a length, or with too long a one, at every level", () => {
  for (let at = 20; at + 4 <= FIRST.length; at += 4) {
    for (const length of [0, 1, 3, 0x7fff, 0xffff]) {
      const { told, counts } = readDatagrams([changed(FIRST, (view) => view.setUint16(at, length, true))]);
      assert.equal(told.length + counts.malformed + counts.skipped, 1, `${length} at ${at}`);
    }
  }
  // A direction's first attribute, which is behind the header of the tuple.
  const { counts } = readDatagrams([changed(FIRST, (view) => view.setUint16(24, 0, true))]);
  assert.equal(counts.malformed, 1);
});

test("MessageReader refuses directions that are not of one protocol", () => {
  // The reply's protocol number, made ICMP, which has no ports.
  const at = FIRST.findIndex((byte, i) => i > 100 && byte === 6 && FIRST.slice(i - 4, i).join() === "5,0,1,0");
  const { told, counts } = readDatagrams([changed(FIRST, (view) => {
    view.setUint8(at, 1);
    view.setUint16(at + 6, 99, true);
  })]);
  assert.deepEqual([told.length, counts.malformed], [0, 1]);
});

test("MessageReader notes a dump that failed or was interrupted", () => {
  const dump: DumpEnd = { done: false, interrupted: false, error: 0 };
  const message = (type: number, flags: number, error: number) => {
    const bytes = new Uint8Array(20);
    const view = new DataView(bytes.buffer);
    view.setUint32(0, 20, true);
    view.setUint16(4, type, true);
    view.setUint16(6, flags, true);
    view.setInt32(16, error, true);
    return bytes;
  };
  readDatagrams([message(3, 0x10, 0)], { dump });
  assert.deepEqual({ ...dump, error: Math.abs(dump.error) }, { done: true, interrupted: true, error: 0 });
  for (const type of [2, 3]) {
    const failed: DumpEnd = { done: false, interrupted: false, error: 0 };
    readDatagrams([message(type, 0, -1)], { dump: failed });
    assert.deepEqual(failed, { done: true, interrupted: false, error: 1 });
  }
});

test("MessageReader survives anything", () => {
  const some = fc.constantFrom(...DATAGRAMS, ...TABLE_DATAGRAMS);
  const poke = fc.record({ at: fc.nat(2048), byte: fc.integer({ min: 0, max: 255 }) });
  const mutated = fc.tuple(some, fc.array(poke, { maxLength: 6 }), fc.nat(2048)).map(([message, pokes, length]) => {
    const copy = message.slice(0, length || undefined);
    for (const { at, byte } of pokes) if (copy.length > 0) copy[at % copy.length] = byte;
    return copy;
  });
  const glued = fc.array(mutated, { maxLength: 4 }).map((all) => Uint8Array.from(all.flatMap((each) => [...each])));
  const watched = new WatchedAddresses(["127.0.0.2", "::1"]);
  fc.assert(
    fc.property(fc.oneof(fc.uint8Array({ maxLength: 400 }), glued), fc.boolean(), (bytes, all) => {
      const dump: DumpEnd = { done: false, interrupted: false, error: 0 };
      for (const options of [all ? {} : { watched }, { dump }]) {
        const { told, counts } = readDatagrams([bytes], options);
        assert.ok(counts.messages <= bytes.length / 16 + 1, "every step is at least a header");
        assert.ok(told.length + counts.malformed + counts.skipped <= counts.messages);
        for (const [, flow] of told) {
          assert.ok(ipaddr.isValid(flow.source) && ipaddr.isValid(flow.destination));
          assert.ok(flow.source_port <= 65535 && flow.destination_port <= 65535);
        }
      }
    }),
    { numRuns: 3_000 },
  );
});

test("dumpRequest() asks for both families", () => {
  const view = new DataView(dumpRequest(7).buffer);
  assert.equal(view.getUint32(0, true), 20);
  assert.equal(view.getUint32(8, true), 7);
  assert.equal(view.getUint8(16), 0, "AF_UNSPEC");
});

test("Backoff next() grows to its cap, and begins anew after a lasting connection", (t) => {
  t.after(() => t.mock.restoreAll());
  let now = 0;
  t.mock.method(performance, "now", () => now);
  const backoff = new Backoff();
  assert.deepEqual(Array.from({ length: 9 }, () => backoff.next()), [0, 100, 200, 400, 800, 1600, 3200, 5000, 5000]);
  backoff.connected();
  assert.equal(backoff.next(), 5000, "it was not connected for long");
  backoff.connected();
  now += 6_000;
  assert.equal(backoff.next(), 0);
});
