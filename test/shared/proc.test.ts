import assert from "node:assert/strict";
import { chmodSync, copyFileSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { test } from "node:test";
import { execa } from "execa";
import { isAlive, processes, processMemory, processStat, signalProcess } from "../../plugins/shared/proc.ts";
import { temporaryFolder, until } from "../helpers.ts";

/** Beyond any pid that the kernel gives out (PID_MAX_LIMIT is 2^22). */
const NOBODY = 2 ** 23;

test("processStat() reads a process whatever its name is", async (t) => {
  const program = join(temporaryFolder(t), ") R 1 (x");
  copyFileSync("/bin/sleep", program);
  chmodSync(program, 0o755);
  const child = execa(program, ["60"], { reject: false, detached: true });
  const pid = child.pid!;
  try {
    await until("it is the program", () => processStat(pid)?.session === pid);
    const stat = processStat(pid)!;
    assert.deepEqual([stat.pid, stat.parent, stat.session], [pid, process.pid, pid]);
    assert(stat.started > processStat(1)!.started);
    assert(processes().some((each) => each.pid === pid && each.started === stat.started));
    assert(processMemory(pid).vms > 0);
  } finally {
    child.kill("SIGKILL");
    await child;
  }
});

// H8: a recycled pid is another process, and a zombie is dead.
test("isAlive() is false for a zombie, for what is gone and for another process of the same pid", async () => {
  const own = processStat(process.pid)!;
  assert.equal(isAlive(own), true);
  assert.equal(isAlive({ pid: own.pid, started: own.started - 1 }), false);
  assert.equal(isAlive({ pid: NOBODY, started: 1 }), false);
  // The child ends once its parent has become a program that never waits for it.
  const child = "until grep -q sleep /proc/$PPID/comm; do :; done";
  const script = '(exec sh -c "$1") & echo $!; exec sleep 60';
  const parent = execa("sh", ["-c", script, "sh", child], { reject: false, buffer: false });
  try {
    const pid = await new Promise<number>((resolve) => {
      parent.nodeChildProcess.stdout!.once("data", (text) => resolve(Number(text)));
    });
    await until("it is a zombie", () => processStat(pid)?.state === "Z");
    assert.equal(isAlive(processStat(pid)!), false);
    assert.deepEqual(processMemory(pid), { rss: 0, vms: 0 });
  } finally {
    parent.nodeChildProcess.kill("SIGKILL");
    await parent;
  }
});

test("what is gone is undefined, zero and no error", () => {
  assert.equal(processStat(NOBODY), undefined);
  assert.deepEqual(processMemory(NOBODY), { rss: 0, vms: 0 });
  assert.equal(signalProcess(NOBODY, "SIGTERM"), false);
});
