import assert from "node:assert/strict";
import { appendFileSync, existsSync, mkdtempSync, readFileSync, rmSync, statSync } from "node:fs";
import { truncateSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { test, type TestContext } from "node:test";
import { execa } from "execa";
import { InstanceLog, type LogOptions } from "../../plugins/shared/logs.ts";
import { instanceOf, ProcessFixture } from "./fixture.ts";
import { cleanup, lacking, temporaryFolder } from "../helpers.ts";

const NEVER = new AbortController().signal;

function logIn(folder: string, options: Partial<LogOptions> = {}) {
  const file = join(folder, "app.log");
  const log = new InstanceLog(file, { maxSize: 65_536, files: 3, ...options });
  const read = async (tail: number) => {
    const lines = [];
    for await (const line of log.lines({ tail, follow: false, signal: NEVER })) lines.push(line);
    return lines;
  };
  return { file, log, read };
}

/** `count` numbered lines of 100 bytes with their newline. */
function numbered(count: number, from = 1): string {
  return Array.from({ length: count }, (_, i) => `${String(from + i).padEnd(98, ".")}!\n`).join("");
}

const number = (line: string) => parseInt(line);

test("lines() gives the last lines and no more", async (t) => {
  const { file, read } = logIn(temporaryFolder(t));
  writeFileSync(file, "a\n\nb\nc");
  const cases: [number, string[]][] = [[0, []], [1, ["c"]], [2, ["b", "c"]], [3, ["", "b", "c"]], [
    99,
    ["a", "", "b", "c"],
  ]];
  for (const [tail, expected] of cases) assert.deepEqual(await read(tail), expected, `tail ${tail}`);
  appendFileSync(file, "\n");
  assert.deepEqual(await read(1), ["c"]);
  writeFileSync(file, "");
  assert.deepEqual(await read(5), []);
});

test("rotate() keeps every line, over all files and in order", async (t) => {
  const { file, log, read } = logIn(temporaryFolder(t), { maxSize: 65_536, files: 10 });
  for (let round = 0; round < 5; round++) {
    appendFileSync(file, numbered(1000, 1 + round * 1000));
    await log.rotate();
    assert(statSync(file).size <= 65_536);
  }
  assert.deepEqual((await read(100_000)).map(number), Array.from({ length: 5000 }, (_, i) => i + 1));
  assert.deepEqual((await read(1500)).map(number), Array.from({ length: 1500 }, (_, i) => 3501 + i));
});

test("rotate() keeps the end of a burst that is beyond what all files hold", async (t) => {
  const { file, log, read } = logIn(temporaryFolder(t));
  writeFileSync(file, numbered(20_000));
  await log.rotate();
  const lines = await read(100_000);
  const kept = lines.length - 1;
  assert(kept >= 3 * 65_536 / 100 - 1, `${kept} lines are left`);
  assert.deepEqual(lines.slice(1).map(number), Array.from({ length: kept }, (_, i) => 20_001 - kept + i));
});

test("rotate() keeps the number of files that it is told", async (t) => {
  for (const files of [0, 1, 3]) {
    const folder = temporaryFolder(t);
    const { file, log } = logIn(folder, { files });
    for (let round = 0; round < 6; round++) {
      appendFileSync(file, numbered(800));
      await log.rotate();
    }
    for (let index = 1; index <= 4; index++) {
      assert.equal(existsSync(`${file}.${index}`), index <= files, `${files} files: ${index}`);
    }
  }
});

test("lines() follows a fast writer over rotations without a gap or a repetition", { timeout: 540_000 }, async (t) => {
  const { file, log } = logIn(temporaryFolder(t), { files: 100 });
  writeFileSync(file, "");
  const last = 30_000;
  const script = 'i=0; while [ $i -lt "$1" ]; do i=$((i+1)); echo "$i ................................"; done >>"$2"';
  const writer = execa("sh", ["-c", script, "sh", String(last), file]);
  let rotating = true;
  const rotation = (async () => {
    while (rotating) {
      await log.rotate();
      await new Promise((resolve) => setImmediate(resolve));
    }
  })();
  const stop = new AbortController();
  let expected = 1;
  try {
    for await (const line of log.lines({ tail: last, follow: true, signal: stop.signal })) {
      assert.equal(number(line), expected++);
      if (expected > last) stop.abort();
    }
  } finally {
    await writer;
    rotating = false;
    await rotation;
  }
  assert.equal(expected, last + 1);
  assert(existsSync(`${file}.5`), "it was rotated while it was read");
});

test("lines() tells a follower how much was rotated away before it read it", async (t) => {
  const { file, log } = logIn(temporaryFolder(t), { files: 1 });
  writeFileSync(file, "first\n");
  const stop = new AbortController();
  const lines = log.lines({ tail: 1, follow: true, signal: stop.signal });
  assert.equal((await lines.next()).value, "first");
  for (let round = 0; round < 3; round++) {
    appendFileSync(file, numbered(1000, round * 1000));
    await log.rotate();
  }
  assert.match((await lines.next()).value!, /^\[dormouse: \d+ bytes were rotated away/);
  stop.abort();
  await lines.return(undefined);
});

test("lines() goes on with what is new after somebody emptied the file", async (t) => {
  const { file, log } = logIn(temporaryFolder(t));
  writeFileSync(file, numbered(10));
  const stop = new AbortController();
  const lines = log.lines({ tail: 1, follow: true, signal: stop.signal });
  assert.equal(number((await lines.next()).value!), 10);
  truncateSync(file);
  appendFileSync(file, "after\n");
  assert.equal((await lines.next()).value, "after");
  stop.abort();
  await lines.return(undefined);
});

test("logs() of the driver follows over rotations, ends with its signal and with its instance", async (t) => {
  const fixture = new ProcessFixture(t, { log_max_size: 65_536, log_files: 50 });
  const driver = fixture.open();
  const instance = instanceOf(
    'i=0; while :; do i=$((i+1)); printf "%0200d\\n" $i; [ $i -lt 1500 ] || sleep 0.01; done',
  );
  await driver.create(instance);
  await driver.start(instance, NEVER);
  const stop = new AbortController();
  let expected = 1;
  for await (const line of driver.logs(instance, { source: "app", tail: 1e6, follow: true, signal: stop.signal })) {
    assert.equal(number(line), expected++);
    if (existsSync(join(fixture.folder(instance), "app.log.2")) && expected > 1500) stop.abort();
  }
  const follower = driver.logs(instance, { source: "app", tail: 1, follow: true, signal: NEVER });
  let deleted: Promise<void> | undefined;
  for await (const _ of follower) deleted ??= driver.delete(instance);
  await deleted;
  assert.deepEqual(fixture.remains(instance), []);
});

// E9: 64 KiB is where others end the stream.
test("lines() passes a line of up to 1 MiB whole, and a longer one in pieces", async (t) => {
  const { file, read } = logIn(temporaryFolder(t));
  writeFileSync(file, `before\n${"x".repeat(2 ** 20)}\n${"y".repeat(2 ** 20 + 10)}\nafter\n`);
  const lines = await read(100);
  assert.deepEqual(lines.map(({ length }) => length), [6, 2 ** 20, 2 ** 20, 10, 5]);
});

test("recover() finishes what a host left that died while it rotated", async (t) => {
  const text = numbered(1000);
  const head = 65_536;
  const setUp = (t: TestContext, cut: boolean) => {
    const made = logIn(temporaryFolder(t));
    writeFileSync(`${made.file}.next-${head}`, text.slice(0, head));
    writeFileSync(made.file, cut ? text.slice(head) : text);
    return made;
  };
  for (const cut of [true, false]) {
    const { file, log, read } = setUp(t, cut);
    await log.recover();
    assert.equal(existsSync(`${file}.1`), cut);
    assert.equal(existsSync(`${file}.next-${head}`), false);
    assert.deepEqual((await read(5000)).map(number), Array.from({ length: 1000 }, (_, i) => i + 1));
  }
  // Died while it moved the older files up: .1 is not there any more, .2 already is.
  const { file, log, read } = setUp(t, true);
  writeFileSync(`${file}.2`, "older\n");
  writeFileSync(`${file}.next-0.new`, "half a copy");
  await log.recover();
  assert.deepEqual((await read(5000)).slice(0, 2).map((line) => line.slice(0, 5)), ["older", "1...."]);
  assert.equal(existsSync(`${file}.next-0.new`), false);
});

const MEMORY = "/dev/shm";
const noTmpfs = existsSync(MEMORY) ? null : `there is no ${MEMORY}`;

test("rotate() copies and empties where the file system cannot cut", { skip: lacking(noTmpfs) }, async (t) => {
  const folder = mkdtempSync(join(MEMORY, "dormouse-test-"));
  cleanup(t).defer(() => rmSync(folder, { recursive: true }));
  const { file, log, read } = logIn(folder);
  for (let round = 0; round < 3; round++) {
    appendFileSync(file, numbered(656, 1 + round * 656));
    await log.rotate();
    assert.equal(readFileSync(file, "utf8"), "");
  }
  const lines = (await read(10_000)).filter((line) => line.length === 99).map(number);
  assert.equal(lines.at(-1), 3 * 656);
  assert(lines.length >= 3 * 655, `${lines.length} lines are left`);
});
