// Run by machine.test.ts in a network of its own: the real main.ts, the real kernel, real machines.
import assert from "node:assert/strict";
import { existsSync, readdirSync, truncateSync } from "node:fs";
import { connect } from "node:net";
import { join } from "node:path";
import process from "node:process";
import { test, type TestContext } from "node:test";
import { freePort, until } from "../helpers.ts";
import { Host } from "../host.ts";
import type { Report } from "./guest.ts";

const BRIDGE = "dmqemu0";

interface Shown {
  id: string;
  state: string;
  exit_message: string | null;
  started_at: string | null;
  timed_out: boolean;
  size: string;
  vcpus: number;
  network: { ip: string; ip6: string | null };
}

/** A host whose instances are machines. */
class Machines extends Host {
  static async begin(t: TestContext): Promise<Machines> {
    const host = new Machines(t, await freePort(), {
      store: {},
      network: { bridge: BRIDGE, subnet: "10.131.0.0/24" },
      hypervisor: { default_driver: "qemu-microvm" },
      qemu: { accel: "tcg", grace: "60s" },
      conntrack: {},
      "conntrack-standby": { min_awake: "0s" },
      wake: {},
      journal: {},
    });
    await host.start();
    const answer = await host.ask("POST", "/images", { name: "demo", path: process.env.DORMOUSE_TEST_IMAGE });
    assert.equal(answer.status, 201, answer.text);
    return host;
  }

  /** What there is of its machines, but for the mark of one that is just being told what time it is. */
  files(): string[] {
    return readdirSync(this.#folderOf(""), { recursive: true, encoding: "utf8" }).filter((path) =>
      !path.endsWith("/stale")
    );
  }

  #folderOf(id: string): string {
    return join(this.folder, "data", "qemu", "instances", id);
  }

  /** How many files and connections it has open. */
  open(): number {
    return readdirSync(`/proc/${this.pid}/fd`).length;
  }

  /** Puts it to sleep; what the kernel tells late of a connection from before may call it back half-way. */
  async asleep(name: string): Promise<void> {
    await until("it sleeps", async () => {
      const { status, text } = await this.ask("POST", `/instances/${name}/standby`, {});
      if (status !== 200) assert.deepEqual([status, JSON.parse(text).code], [409, "aborted"]);
      return status === 200;
    });
  }

  /** R10: what time a machine says it is when it first answers after a sleep, and at the latest once it was told. */
  async timed(id: string, address: string): Promise<{ answers: Report[]; off: number; late: boolean }> {
    const first = await timed(address);
    if (first.off < 100) return { answers: [first.answer], off: first.off, late: false };
    // Connected, so that it does not fall asleep before, and asking nothing.
    const [host, port = "80"] = address.split(":");
    const held = connect(Number(port), host).on("error", () => {});
    try {
      await until("it was told what time it is", () => !existsSync(join(this.#folderOf(id), "stale")), 180_000);
    } finally {
      held.destroy();
    }
    const again = await timed(address);
    return { answers: [first.answer, again.answer], off: again.off, late: true };
  }

  async becomes(name: string, state: string): Promise<void> {
    const waited = await this.call<Shown>("GET", `/${name}/wait?state=${state}&timeout=3m`);
    assert.deepEqual([waited.state, waited.timed_out], [state, false]);
  }
}

async function report(address: string): Promise<Report> {
  const response = await fetch(`http://${address}/`, { headers: { connection: "close" } });
  return await response.json();
}

/** How often a machine may say the time of before a sleep in the first moments after it, on a busy machine, of so many sleeps. */
const LATE_OF = 7;

/** The answer, and how many milliseconds its clock is away from every moment of the asking. */
async function timed(address: string): Promise<{ answer: Report; off: number }> {
  const before = Date.now();
  const answer = await report(address);
  const off = answer.clock < before ? before - answer.clock : Math.max(answer.clock - Date.now(), 0);
  return { answer, off };
}

test("a machine is Initializing until it answers, counts in its memory, and is gone when it is deleted", async (t) => {
  const host = await Machines.begin(t);
  const made = await host.call<Shown>("POST", "", { name: "web", image: "demo" });
  assert.deepEqual([made.state, made.vcpus, made.size], ["Initializing", 1, "128MB"]);
  await host.becomes("web", "Running");
  const { ip, ip6 } = made.network;
  const first = await report(ip);
  assert.deepEqual([first.hostname, first.requests, first.boots], ["web", 1, 1]);
  if (ip6 !== null) assert.equal((await report(`[${ip6}]`)).requests, 2);

  const { text } = await host.ask("GET", "/images");
  assert.deepEqual(JSON.parse(text).map(({ name, status }: Record<string, string>) => [name, status]), [[
    "demo",
    "ready",
  ]]);
  const refused = await host.ask("DELETE", "/images/demo");
  assert.deepEqual([refused.status, JSON.parse(refused.text).code], [409, "image_in_use"]);

  const { exit_code, stdout } = await host.call<Record<string, unknown>>("POST", "/web/exec", { command: ["uname"] });
  assert.deepEqual([exit_code, stdout], [0, "Linux\n"]);
  const info = await host.call<Record<string, unknown>>("GET", "/web/stat?path=/etc/rc");
  assert.deepEqual([info.exists, info.is_file], [true, true]);

  // What it has written is in its memory alone as it falls asleep, and a stop loses none of it, nor does the host's.
  const write = ["sh", "-c", "head -c 1000000 /dev/zero >/data/written; echo kept >>/data/written"];
  await host.call("POST", "/web/exec", { command: write });
  await host.asleep("web");
  const stopped = host.ask("POST", "/instances/web/stop").then(({ status }) => status, () => "cut off");
  const under = ["Shutdown", "Stopped"];
  await until("it is on its way", async () => under.includes((await host.call<Shown>("GET", "/web")).state));
  await host.end();
  // A host waits for some seconds only, and a machine that is slower ends when nobody is there to see how.
  const answered = await stopped;
  assert.ok([200, "cut off"].includes(answered), String(answered));
  await host.start();
  await host.becomes("web", "Stopped");
  const { exit_message } = await host.call<Shown>("GET", "/web");
  if (answered === 200) assert.equal(exit_message, "the guest powered off");
  await host.call("POST", "/web/start", {});
  await host.becomes("web", "Running");
  const again = await report(ip);
  assert.deepEqual([again.requests, again.boots], [1, 2], "memory is new, the disk is not");
  const read = await host.call<Record<string, unknown>>("POST", "/web/exec", {
    command: ["tail", "-c5", "/data/written"],
  });
  assert.equal(read.stdout, "kept\n");
  const begin = ["sh", "-c", "touch /run/begun; sleep 60"];
  const cut = host.ask("POST", "/instances/web/exec", { command: begin });
  await until("it runs", async () => (await host.call<{ exists: boolean }>("GET", "/web/stat?path=/run/begun")).exists);
  await host.call("DELETE", "/web");
  const { status, text: why } = await cut;
  assert.deepEqual([status, JSON.parse(why).code], [409, "invalid_state"], why);
  assert.equal((await host.ask("DELETE", "/images/demo")).status, 204);
  const gone = await host.ask("POST", "/instances", { name: "web", image: "demo" });
  assert.deepEqual([gone.status, JSON.parse(gone.text).code], [404, "image_not_found"]);
});

// And where that cannot be, whoever is connected is served, if that was wanted, and what it has cost is told.
test("a machine sleeps when nobody is connected, and the next connection finds it as it was", async (t) => {
  const host = await Machines.begin(t);
  const port = await freePort();
  const { id } = await host.call<Shown>("POST", "", {
    name: "web",
    image: "demo",
    auto_standby: { enabled: true, idle_timeout: "1s" },
    wake: { ports: [{ host_port: port, guest_port: 80 }], timeout: "3m" },
    restore_fallback: "start",
  });
  await host.becomes("web", "Running");
  const clocks: number[] = [];
  let requests = 0;
  for (let round = 1; round <= 4; round++) {
    // The third time, the host is another one.
    if (round === 3) {
      await host.kill();
      await host.start();
    }
    const { answers, off } = await host.timed(id, `127.0.0.1:${port}`);
    clocks.push(off);
    for (const answer of answers) assert.deepEqual([answer.requests, answer.boots], [++requests, 1]);
    // R10: what it slept through is no time that it lost. After its boot it has that of a machine's clock, in seconds.
    assert.ok(round === 1 || off < 100, `its clock is ${off} ms off`);
    await host.becomes("web", "Standby");
  }
  console.log(`seen: clocks at the answer, in ms off: ${clocks.join(", ")}`);

  truncateSync(join(host.folder, "data", "qemu", "instances", id, "state"), 1_000);
  const anew = await report(`127.0.0.1:${port}`);
  assert.deepEqual([anew.requests, anew.boots], [1, 2]);
  const { events } = await host.call<{ events: Record<string, string>[] }>("GET", "/web/events?type=qemu:memory_lost");
  assert.deepEqual(events.map(({ actor, cause }) => [actor, cause]), [["qemu", "restore_failed"]]);
  assert.match(events[0].summary, /^"web" has lost its memory, as it could not be restored: QEMU ended: /);
});

test("fifty rounds of standby and restore lose nothing, leave nothing behind and drift nowhere", async (t) => {
  const host = await Machines.begin(t);
  const { id, network } = await host.call<Shown>("POST", "", { name: "web", image: "demo" });
  await host.becomes("web", "Running");
  let [files, open, requests, lates] = [0, 0, 0, 0];
  const rounds = 51;
  for (let round = 1; round <= rounds; round++) {
    const { answers, off, late } = await host.timed(id, network.ip);
    if (round > 1 && late) lates++;
    for (const answer of answers) assert.deepEqual([answer.requests, answer.boots], [++requests, 1]);
    assert.ok(round === 1 || off < 100, `its clock is ${off} ms off`);
    if (round === 3) [files, open] = [host.files().length, host.open()];
    await host.asleep("web");
    assert.equal((await host.call<Shown>("POST", "/web/restore")).state, "Running");
  }
  console.log(`seen: ${lates} of ${rounds} times it did not know at first what time it is`);
  assert.ok(lates <= rounds / LATE_OF, `${lates} of ${rounds} times it did not know at first what time it is`);
  assert.equal(host.files().length, files, host.files().join("\n"));
  // Connections that were answered may still be on their way out.
  // And the machine's agent may have been given up for a moment when they were counted.
  await until("nothing more is open than after two rounds", () => host.open() <= open + 2);
});

// F1, F3: each copy is somebody of its own before it is told of; and its source sleeps on, as it was.
test("forks of a sleeping machine answer with their own names on their own addresses", async (t) => {
  const host = await Machines.begin(t);
  const { network } = await host.call<Shown>("POST", "", {
    name: "source",
    image: "demo",
    // Else a connection that the guest has not quite ended in its sleep wakes it.
    wake: { enabled: false },
  });
  await host.becomes("source", "Running");
  assert.equal((await report(network.ip)).requests, 1);
  await host.asleep("source");
  const random = async (name: string) => {
    const command = ["sh", "-c", "head -c 16 /dev/urandom | base64"];
    return (await host.call<{ stdout: string }>("POST", `/${name}/exec`, { command })).stdout;
  };
  const numbers = new Set<string>();
  for (const name of ["one", "two", "three"]) {
    const began = performance.now();
    const fork = await host.call<Shown>("POST", "/source/fork", { name, target_state: "Running" });
    console.log(`seen: ${name} was forked within ${Math.round(performance.now() - began)} ms`);
    // On a machine that is slow to hear who it is.
    if (fork.state === "Initializing") await host.becomes(name, "Running");
    else assert.equal(fork.state, "Running");
    assert.ok(fork.started_at);
    assert.notEqual(fork.network.ip, network.ip);
    const { answers: [own], off } = await host.timed(fork.id, fork.network.ip);
    assert.deepEqual([own.hostname, own.requests, own.boots], [name, 2, 1]);
    assert.ok(off < 100, `its clock is ${off} ms off`);
    if (fork.network.ip6 !== null) assert.equal((await report(`[${fork.network.ip6}]`)).hostname, name);
    numbers.add(await random(name));
    assert.equal((await host.call<Shown>("GET", "/source")).state, "Standby");
  }
  assert.equal(numbers.size, 3);
  await host.call("POST", "/source/restore");
  const awake = await report(network.ip);
  assert.deepEqual([awake.hostname, awake.requests], ["source", 2]);

  // A copy sleeps as others do, over a host that was killed too, and runs on when its source is gone.
  await host.call("DELETE", "/source");
  await host.asleep("one");
  await host.kill();
  await host.start();
  await host.call("POST", "/one/restore");
  const { ip } = (await host.call<Shown>("GET", "/one")).network;
  assert.equal((await report(ip)).requests >= 3, true);
  const copy = await host.call<Shown>("POST", "/one/fork", {
    name: "copy",
    from_running: true,
    target_state: "Running",
  });
  assert.deepEqual([(await report(copy.network.ip)).hostname, (await report(ip)).hostname], ["copy", "one"]);

  // F4: nor does a copy of what is stopped keep the place of its source.
  await host.call("POST", "/two/stop");
  const stopped = await host.call<Shown>("POST", "/two/fork", { name: "anew" });
  assert.equal(stopped.state, "Stopped");
  await host.call("POST", "/anew/start", {});
  await host.becomes("anew", "Running");
  const anew = await report(stopped.network.ip);
  assert.deepEqual([anew.hostname, anew.requests, anew.boots], ["anew", 1, 2], "its disk is a copy");
});
