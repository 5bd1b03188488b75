import assert from "node:assert/strict";
import { existsSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { test, type TestContext } from "node:test";
import { delay } from "../../plugins/shared/async.ts";
import { isAlive, processStat } from "../../plugins/shared/proc.ts";
import { argumentsOf, cleanup, freePort, until } from "../helpers.ts";
import { Host } from "../host.ts";

interface Shown {
  state: string;
  exit_code: number | null;
  restart_status?: {
    attempts: number;
    next_attempt_at: string | null;
    blocked_reason: string | null;
    last_reason: string | null;
  };
}

/** Holds back the starts of the instance `slow` until a file says go. */
const SLOW = `
import { existsSync } from "node:fs";
export default {
  name: "slow",
  requires: ["hypervisor"],
  setup(host) {
    host.hooks.guard("before:start", async ({ instance, signal }) => {
      if (instance.name !== "slow") return;
      const go = instance.env.GO;
      while (!existsSync(go) && !signal.aborted) await new Promise((resolve) => setTimeout(resolve, 20));
    }, { timeout: 300_000 });
  },
};
`;

/** A host with real processes as instances, on the machine's own network. */
class Machine extends Host {
  static async begin(t: TestContext): Promise<Machine> {
    const machine = new Machine(t, await freePort(), {
      store: {},
      hypervisor: {},
      process: { grace: "2s", cgroup_parent: "" },
      health: {},
      restart: { max_concurrent: 1 },
      slow: { use: "./slow.mjs" },
    });
    writeFileSync(join(machine.folder, "slow.mjs"), SLOW);
    cleanup(t).defer(() => machine.#clear());
    await machine.start();
    // What is held back would hold back its own end.
    cleanup(t).defer(() => machine.go());
    return machine;
  }

  #path(name: string, what: "starts" | "pid" | "well" | "go"): string {
    return join(this.folder, `${name}.${what}`);
  }

  /** What a test that failed while there was no host has left. */
  #clear(): void {
    for (const name of readdirSync(this.folder).filter((name) => name.endsWith(".pid"))) {
      const pid = readFileSync(join(this.folder, name), "utf8").trim();
      if (argumentsOf(pid).includes(this.folder)) process.kill(Number(pid), "SIGKILL");
    }
  }

  /** An instance that counts its starts, says that it is well, and then does what `script` says: it waits by default. */
  async make(name: string, policy: Record<string, unknown>, more: { script?: string; health?: boolean } = {}) {
    const { script = "exec sleep 600", health = false } = more;
    const [starts, pid, well] = (["starts", "pid", "well"] as const).map((what) => this.#path(name, what));
    // Last what a test waits for.
    const first = `echo $$ > ${pid}.new; mv ${pid}.new ${pid}; touch ${well}; echo start >> ${starts};`;
    return await this.call<Shown>("POST", "", {
      name,
      image: "host",
      cmd: ["sh", "-c", `${first} ${script}`],
      env: { GO: this.#path(name, "go") },
      restart_policy: policy,
      ...(health && {
        health_check: {
          exec: { command: ["test", "-e", well] },
          interval: "1s",
          timeout: "1s",
          start_period: "5s",
          failure_threshold: 2,
        },
      }),
    });
  }

  show(name: string): Promise<Shown> {
    return this.call("GET", `/${name}`);
  }
  post(name: string, action: "start" | "stop"): Promise<Shown> {
    return this.call("POST", `/${name}/${action}`);
  }
  starts(name: string): number {
    const path = this.#path(name, "starts");
    return existsSync(path) ? readFileSync(path, "utf8").trim().split("\n").length : 0;
  }
  /** Lets the instance `slow` start. */
  go(): void {
    writeFileSync(this.#path("slow", "go"), "");
  }
  wait(): void {
    rmSync(this.#path("slow", "go"), { force: true });
  }
  sicken(name: string): void {
    rmSync(this.#path(name, "well"));
  }

  /** Resolves once the program has begun that many times, and runs. */
  async began(name: string, starts: number, ms = 180_000): Promise<void> {
    const runs = async () => this.starts(name) === starts && (await this.show(name)).state === "Running";
    await until(`start ${starts} of ${name}`, runs, ms);
  }

  /** kill -9 of the program itself, as the kernel does when memory is short. */
  crash(name: string): void {
    const pid = Number(readFileSync(this.#path(name, "pid"), "utf8"));
    process.kill(pid, "SIGKILL");
  }

  /** The program as it is in this run: a pid and when it began. */
  program(name: string) {
    return processStat(Number(readFileSync(this.#path(name, "pid"), "utf8")))!;
  }

  /** Crashes the instance until it has a back-off to wait for that leaves time to do something in; its starts so far. */
  async waiting(name: string): Promise<number> {
    for (let starts = this.starts(name);; starts++) {
      assert.ok(starts < 40, "luck has it that no back-off is long enough");
      await this.began(name, starts);
      this.crash(name);
      const ended = async () => (await this.show(name)).state === "Stopped" || this.starts(name) > starts;
      await until(`${name} ends`, ended);
      const next = (await this.show(name)).restart_status?.next_attempt_at;
      if (next && Date.parse(next) - Date.now() > 4_000) return starts;
    }
  }
}

// H8: it is dead, whoever has its pid next; H5.
test(
  "a program that is killed with -9 is started again, one that completes is not",
  { timeout: 540_000 },
  async (t) => {
    const machine = await Machine.begin(t);
    await machine.make("web", { policy: "on_failure" });
    await machine.began("web", 1);
    const before = machine.program("web");
    machine.crash("web");
    await machine.began("web", 2);
    assert.ok(!isAlive(before) && isAlive(machine.program("web")));
    assert.equal((await machine.show("web")).restart_status?.attempts, 1);
    await machine.make("job", { policy: "on_failure" }, { script: "exit 0" });
    await until("the job ends", async () => (await machine.show("job")).state === "Stopped");
    const { exit_code, restart_status } = await machine.show("job");
    assert.deepEqual([exit_code, restart_status], [0, undefined]);
    // H9: one that never works is given up.
    await machine.make("broken", { policy: "always", backoff: "10ms", max_attempts: 3 }, { script: "exit 7" });
    const blocked = async () =>
      (await machine.show("broken")).restart_status?.blocked_reason === "max_attempts_exceeded";
    await until("it is given up", blocked);
    assert.deepEqual([machine.starts("broken"), machine.starts("job")], [4, 1]);
  },
);

// H4
test("an instance that starts slowly delays no other, with one place for all", { timeout: 540_000 }, async (t) => {
  const machine = await Machine.begin(t);
  machine.go();
  for (const name of ["slow", "quick"]) {
    await machine.make(name, { policy: "always" });
    await machine.began(name, 1);
  }
  machine.wait();
  machine.crash("slow");
  await until("the slow one ends", async () => (await machine.show("slow")).state === "Stopped");
  machine.crash("quick");
  await machine.began("quick", 2);
  assert.deepEqual([machine.starts("slow"), (await machine.show("slow")).state], [1, "Stopped"]);
  machine.go();
  await machine.began("slow", 2);
});

// H4, S10
test("a host that is killed with -9 during a back-off leaves it to the next one", { timeout: 600_000 }, async (t) => {
  const machine = await Machine.begin(t);
  await machine.make("web", { policy: "always", backoff: "8s", max_backoff: "8s" });
  await machine.began("web", 1);
  let starts = await machine.waiting("web");
  await machine.kill();
  await machine.start();
  await machine.began("web", starts + 1);
  assert.equal((await machine.show("web")).restart_status?.attempts, starts);
  // The same with a stop in between, which is all that the host was still there to answer.
  starts = await machine.waiting("web");
  const { state, restart_status } = await machine.post("web", "stop");
  assert.deepEqual([state, restart_status?.blocked_reason], ["Stopped", "manual_stop"]);
  starts = machine.starts("web"); // one more on a machine that took so long to answer
  await machine.kill();
  await machine.start();
  await delay(8_500); // longer than any back-off it may have had
  assert.deepEqual([(await machine.show("web")).state, machine.starts("web")], ["Stopped", starts]);
  await machine.post("web", "start");
  await machine.began("web", starts + 1);
});

// H8, S10
test("a program and a host that are killed with -9 at once are both back", { timeout: 600_000 }, async (t) => {
  const machine = await Machine.begin(t);
  await machine.make("web", { policy: "on_failure", backoff: "10ms", max_backoff: "10ms" });
  for (let starts = 1; starts <= 6; starts++) {
    await machine.began("web", starts);
    machine.crash("web");
    // From before anybody has noticed to after it was decided what to do about it, and done.
    if (starts > 1) await delay(Math.random() * 60);
    await machine.kill();
    await machine.start();
  }
  await machine.began("web", 7);
});

// H6, S10
test(
  "an unhealthy program is replaced, by the next host where one is killed in the middle",
  { timeout: 600_000 },
  async (t) => {
    const machine = await Machine.begin(t);
    const policy = { policy: "on_failure", on_unhealthy: true, backoff: "10ms", max_backoff: "10ms" };
    // It does not listen, so a stop takes the whole grace.
    await machine.make("web", policy, { script: "trap '' TERM; while :; do sleep 1; done", health: true });
    await machine.began("web", 1);
    machine.sicken("web");
    await machine.began("web", 2);
    const { attempts, last_reason } = (await machine.show("web")).restart_status!;
    assert.deepEqual([attempts, last_reason], [1, "health_check_failed"]);
    machine.sicken("web");
    // As it happens, for it does not last.
    const { state } = await machine.call<Shown>("GET", "/web/wait?state=Shutdown&timeout=2m");
    assert.equal(state, "Shutdown");
    await machine.kill();
    await machine.start();
    await machine.began("web", 3);
    assert.equal((await machine.show("web")).restart_status?.attempts, 2);
  },
);
