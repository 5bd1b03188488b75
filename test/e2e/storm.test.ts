import assert from "node:assert/strict";
import { readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { DatabaseSync } from "node:sqlite";
import { test, type TestContext } from "node:test";
import { execa } from "execa";
import { stringify } from "smol-toml";
import { argumentsOf, cleanup, freePort, lacking, ROOT, runMain, RUNTIME, temporaryFolder, until } from "../helpers.ts";

const OPERATIONS = 500;
const CLIENTS = 6;
const KILLS = 8;
const BRIDGE = "dmstorm0";
/** Seconds that each instance sleeps for: a number that no other process of this machine has as its argument. */
const marker = (n: number) => String(770_000_000 + n);

/** What is known of one name from the answers that came: `maybe` where the host died before it answered. */
interface Known {
  n: number;
  /** What the last answer said; null when deleted or never made. */
  state: "Running" | "Standby" | null;
  /** States that an unanswered request may have led to. */
  maybe: ("Running" | "Standby" | null)[];
}

interface Shown {
  name: string;
  state: string;
  state_error: string | null;
}

const reason = process.getuid?.() === 0 ? null : "needs root for namespaces and cgroups";

// S9, H8, and the promise of the whole: kill -9 at any moment loses nothing that was acknowledged and leaks nothing.
test(
  "a storm of requests with kill -9 of the host loses, doubles and leaks nothing",
  { skip: lacking(reason) },
  async (t) => {
    const storm = await Storm.begin(t);
    t.diagnostic(`seed ${storm.seed}`);
    let done = 0;
    for (let round = 0; round <= KILLS; round++) {
      const quota = round === KILLS ? OPERATIONS - done : Math.floor(OPERATIONS / (KILLS + 1));
      done += await storm.run(quota, round < KILLS);
      if (round < KILLS) await storm.restart();
      await storm.verify();
    }
    assert.ok(done >= OPERATIONS, `${done} operations`);
    await storm.end();
  },
);

class Storm {
  readonly seed = Date.now() % 1_000_000;
  readonly #t: TestContext;
  readonly #config: string;
  readonly #port: number;
  readonly #names = new Map<string, Known>();
  #host: ReturnType<typeof runMain> | undefined;
  #random: number;
  #made = 0;

  private constructor(t: TestContext, config: string, port: number) {
    this.#t = t;
    this.#config = config;
    this.#port = port;
    this.#random = this.seed;
  }

  static async begin(t: TestContext): Promise<Storm> {
    const folder = temporaryFolder(t);
    const port = await freePort();
    const config = join(folder, "config.toml");
    const plugins = {
      store: {},
      network: { bridge: BRIDGE, subnet: "10.121.0.0/16" },
      hypervisor: {},
      process: { grace: "1s" },
      api: { listen: `127.0.0.1:${port}` },
    };
    writeFileSync(config, stringify({ data_dir: "data", host: { log_level: "warning" }, plugins }));
    const storm = new Storm(t, config, port);
    cleanup(t).defer(async () => {
      storm.#host?.kill("SIGKILL");
      await storm.#host;
      for (const pid of sleepers().keys()) process.kill(pid, "SIGKILL");
      const [command, ...flags] = RUNTIME;
      await execa(command, [...flags, join(ROOT, "main.ts"), "--config", config, "--purge-network"]);
    });
    await storm.#start();
    return storm;
  }

  /** Clients ask for things until `quota` requests were sent; with `kill`, the host dies somewhere on the way. */
  async run(quota: number, kill: boolean): Promise<number> {
    let sent = 0;
    const deathAt = kill ? Math.floor(quota * (0.3 + 0.6 * this.#next())) : Infinity;
    const client = async () => {
      while (sent < quota) {
        if (++sent === deathAt) this.#host!.kill("SIGKILL");
        // Without a kill, an unanswered request is a kept connection of the host before this one: the next has a new one.
        if (!await this.#request() && kill) return;
      }
    };
    await Promise.all(Array.from({ length: CLIENTS }, client));
    // Nobody may have got that far.
    if (kill) this.#host!.kill("SIGKILL");
    return sent;
  }

  async restart(): Promise<void> {
    await this.#host;
    await this.#start();
  }

  /** The list agrees with every answer, and the machine agrees with the list. */
  async verify(): Promise<void> {
    const shown = new Map((await this.#list()).map((instance) => [instance.name, instance]));
    for (const [name, known] of this.#names) {
      const possible = [known.state, ...known.maybe];
      const found = shown.get(name)?.state ?? null;
      assert.ok(
        possible.includes(found as never),
        `${name} is ${found} (${shown.get(name)?.state_error}), expected ${possible} (seed ${this.seed})`,
      );
      this.#names.set(name, { n: known.n, state: found as Known["state"], maybe: [] });
      shown.delete(name);
    }
    assert.deepEqual([...shown.keys()], [], `instances that nobody asked for (seed ${this.seed})`);
    const alive = [...this.#names.values()].filter(({ state }) => state !== null);
    await until("each instance has one process and no other has any", () => {
      const running = processes();
      return running.length === alive.length && alive.every(({ n }) => running.includes(marker(n)));
    });
  }

  async end(): Promise<void> {
    for (const { name } of await this.#list()) await this.#call("DELETE", `/${name}`);
    assert.deepEqual(await this.#list(), []);
    assert.deepEqual(processes(), []);
    assert.deepEqual(await namespacesAndLinks(), [], "namespaces and links");
    assert.deepEqual(cgroups(), [], "cgroups");
    for (const folder of ["instances", "exits"]) {
      assert.deepEqual(readdirSync(join(this.#config, "..", "data", "process", folder)), [], folder);
    }
    const db = new DatabaseSync(join(this.#config, "..", "data", "dormouse.db"), { readOnly: true });
    assert.deepEqual(db.prepare("SELECT * FROM addresses").all(), [], "addresses");
    db.close();
    // Not child.kill(): Deno reports its signal as the end of a child that caught it and exited with 0.
    process.kill(this.#host!.pid!, "SIGTERM");
    assert.equal((await this.#host!).exitCode, 0);
  }

  async #start(): Promise<void> {
    this.#host = runMain(this.#t, ["--config", this.#config]);
    const health = () => fetch(`http://127.0.0.1:${this.#port}/health`).then((answer) => answer.ok, () => false);
    await until("the host answers", health, 180_000);
  }

  /** One random request to a name that no other client is busy with; false when the host did not answer. */
  async #request(): Promise<boolean> {
    const free = [...this.#names].filter(([name, { state }]) => state !== null && !this.#busy.has(name));
    const choice = this.#next();
    if (free.length < 4 || choice < 0.3) {
      const n = this.#made++;
      return await this.#ask(`s${n}`, n, "Running", "POST", "", {
        name: `s${n}`,
        image: "host",
        cmd: ["sleep", marker(n)],
      });
    }
    const [name, { n }] = free[Math.floor(this.#next() * free.length)];
    if (choice < 0.55) return await this.#ask(name, n, "Standby", "POST", `/${name}/standby`);
    if (choice < 0.8) return await this.#ask(name, n, "Running", "POST", `/${name}/restore`);
    return await this.#ask(name, n, null, "DELETE", `/${name}`);
  }

  readonly #busy = new Set<string>();

  async #ask(
    name: string,
    n: number,
    leadsTo: Known["state"],
    method: string,
    path: string,
    body?: unknown,
  ): Promise<boolean> {
    const before = this.#names.get(name) ?? { n, state: null, maybe: [] };
    this.#names.set(name, { ...before, maybe: [leadsTo] });
    this.#busy.add(name);
    try {
      const answer = await this.#call(method, path, body);
      if (answer === undefined) return false;
      assert.ok(answer.ok, `${method} ${path}: ${answer.status} ${answer.text} (seed ${this.seed})`);
      this.#names.set(name, { n, state: leadsTo, maybe: [] });
      return true;
    } finally {
      this.#busy.delete(name);
    }
  }

  async #list(): Promise<Shown[]> {
    const answer = await this.#call("GET", "");
    return JSON.parse(answer!.text);
  }

  /** Undefined when no answer came, because the host died. */
  async #call(
    method: string,
    path: string,
    body?: unknown,
  ): Promise<{ ok: boolean; status: number; text: string } | undefined> {
    const headers = { "content-type": "application/json" };
    try {
      const response = await fetch(`http://127.0.0.1:${this.#port}/instances${path}`, {
        method,
        headers,
        ...(body !== undefined && { body: JSON.stringify(body) }),
      });
      return { ok: response.ok, status: response.status, text: await response.text() };
    } catch (error) {
      if (error instanceof TypeError || (error as Error).name === "ConnectionReset") return undefined;
      throw error;
    }
  }

  // mulberry32, so that a failure can be run again from its seed.
  #next(): number {
    this.#random = (this.#random + 0x6d2b79f5) | 0;
    let x = Math.imul(this.#random ^ (this.#random >>> 15), 1 | this.#random);
    x = (x + Math.imul(x ^ (x >>> 7), 61 | x)) ^ x;
    return ((x ^ (x >>> 14)) >>> 0) / 4_294_967_296;
  }
}

/** The markers of all `sleep` processes of ours, a zombie not counted. */
function processes(): string[] {
  return [...sleepers().values()];
}

/** The same by pid. */
function sleepers(): Map<number, string> {
  const found = readdirSync("/proc").filter((entry) => /^\d+$/.test(entry)).flatMap((pid) => {
    const [command, argument = ""] = argumentsOf(pid).split("\0");
    const ours = command.endsWith("sleep") && argument.startsWith("7700") && argument.length === 9;
    return ours ? [[Number(pid), argument] as const] : [];
  });
  return new Map(found);
}

/** Network namespaces of ours, and links other than the bridge that belong to it. */
async function namespacesAndLinks(): Promise<string[]> {
  const { stdout: namespaces } = await execa("ip", ["netns", "list"]);
  const { stdout: links } = await execa("ip", ["-o", "link", "show", "master", BRIDGE]);
  return [...namespaces.split("\n").filter((line) => line.includes(BRIDGE)), ...links.split("\n")].filter((line) =>
    line !== ""
  );
}

/** Cgroups below ours that still hold a process. */
function cgroups(): string[] {
  const found: string[] = [];
  // Others' come and go while this looks.
  const there = <T>(read: () => T, otherwise: T): T => {
    try {
      return read();
    } catch (error) {
      if (["ENOENT", "ENODEV"].includes((error as NodeJS.ErrnoException).code!)) return otherwise;
      throw error;
    }
  };
  const walk = (folder: string) => {
    for (const entry of there(() => readdirSync(folder, { withFileTypes: true }), [])) {
      if (!entry.isDirectory()) continue;
      const path = join(folder, entry.name);
      const pids = there(() => readFileSync(join(path, "cgroup.procs"), "utf8").trim(), "");
      const ours = pids.split("\n").some((pid) => pid !== "" && argumentsOf(pid).includes("sleep\x007700"));
      if (ours) found.push(path);
      walk(path);
    }
  };
  const mount = readFileSync("/proc/self/mountinfo", "utf8").split("\n").find((line) => / - cgroup2 /.test(line))
    ?.split(" ")[4];
  if (mount) walk(mount);
  return found;
}
