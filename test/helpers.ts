import { createSocket } from "node:dgram";
import { once } from "node:events";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import process from "node:process";
import type { TestContext } from "node:test";
import { configureSync, type LogRecord, resetSync } from "@logtape/logtape";
import { execa } from "execa";
import { stringify } from "smol-toml";
import { loadPlugins, type Plugin, type RunningHost, startHost } from "../main.ts";
import { delay } from "../plugins/shared/async.ts";
import { readConfig } from "../plugins/shared/config.ts";
import { readIfThere } from "../plugins/shared/files.ts";

/** The folder of the project. */
export const ROOT = resolve(import.meta.dirname!, "..");
/** How this runtime starts a script, before the script's path: `[execPath, ...flags]`. */
export const RUNTIME: readonly string[] = "Deno" in globalThis
  ? [process.execPath, "run", "-A", "--quiet"]
  : [process.execPath];

const stacks = new WeakMap<TestContext, AsyncDisposableStack>();

/** What ends with the test, the last registered first; `t.after` alone runs in the order of registration. */
export function cleanup(t: TestContext): AsyncDisposableStack {
  let stack = stacks.get(t);
  if (!stack) {
    const made = stack = new AsyncDisposableStack();
    stacks.set(t, made);
    t.after(() => made.disposeAsync());
  }
  return stack;
}

const folders = new Set<string>();

/** A new folder that is removed after the test. */
export function temporaryFolder(t: TestContext): string {
  const folder = mkdtempSync(join(tmpdir(), "dormouse-test-"));
  // Under Deno what stands in a suite has no `after`.
  if (folders.size === 0) {
    (globalThis as Partial<EventTarget>).addEventListener?.("unload", () => folders.forEach(remove));
  }
  folders.add(folder);
  cleanup(t).defer(() => remove(folder));
  return folder;
}

function remove(folder: string): void {
  rmSync(folder, { recursive: true, force: true });
}

export interface StartOptions {
  /** Where `config.toml` and `data/` are; a new one when absent. The same folder again is a restart. */
  folder?: string;
  /** The `[host]` table. */
  host?: Record<string, unknown>;
  /** The `[plugins.NAME]` tables, by name. */
  tables?: Record<string, Record<string, unknown>>;
}

/**
 * A host in this process made of `plugins`, with a real config file and data_dir; closed after the test.
 *
 * @throws {DormouseError} as reading the config, loading and starting do
 */
export async function startWith(t: TestContext, plugins: Plugin[], options: StartOptions = {}): Promise<RunningHost> {
  const { folder = temporaryFolder(t), host = {}, tables = {} } = options;
  const file = join(folder, "config.toml");
  const named = Object.fromEntries(plugins.map(({ name }) => [name, tables[name] ?? {}]));
  writeFileSync(file, stringify({ data_dir: "data", host, plugins: named }));
  const { config, problems } = readConfig(file, { env: {}, dataDir: join(folder, "data") });
  const given = new Map(plugins.map((plugin) => [plugin.name, plugin]));
  const running = await startHost(config, await loadPlugins(config, { problems, given }));
  cleanup(t).defer(() => running.close());
  return running;
}

/** The log of this process from here to the end of the test, as `level: message` with the properties filled in. */
export function capturedLogs(t: TestContext): string[] {
  const lines: string[] = [];
  const keep = ({ level, message }: LogRecord) => void lines.push(`${level}: ${message.map(String).join("")}`);
  const loggers = [{ category: "dormouse", sinks: ["keep"] }, { category: ["logtape", "meta"], sinks: [] }];
  configureSync({ reset: true, sinks: { keep }, loggers });
  cleanup(t).defer(resetSync);
  return lines;
}

/** The real `main.ts` as a process of this runtime, its output collected; killed after the test if it still runs. */
export function runMain(t: TestContext, args: string[], env: Record<string, string> = {}) {
  const [command, ...flags] = RUNTIME;
  const child = execa(command, [...flags, join(ROOT, "main.ts"), ...args], { env, reject: false, stdin: "ignore" });
  cleanup(t).defer(async () => {
    child.kill("SIGKILL");
    await child;
  });
  return child;
}

/**
 * The `skip` option of a test that needs what this machine may lack: `test(name, { skip: lacking(reason) }, ...)` with
 * `reason` null where nothing is missing.
 *
 * @throws {Error} where `DORMOUSE_E2E=require` makes a skip a failure
 */
export function lacking(reason: string | null): string | false {
  if (reason === null) return false;
  if (process.env.DORMOUSE_E2E === "require") throw new Error(`Cannot skip with DORMOUSE_E2E=require: ${reason}`);
  return reason;
}

/**
 * Polls for what sends no event, such as a process that must be gone. Anything that does send one is awaited instead.
 *
 * @throws {Error} with `what` where it is not so after `ms` milliseconds
 */
export async function until(what: string, condition: () => boolean | Promise<boolean>, ms = 180_000): Promise<void> {
  const end = Date.now() + ms;
  while (!await condition()) {
    if (Date.now() > end) throw new Error(`Not within ${ms} ms: ${what}`);
    await delay(10);
  }
}

/** A process's arguments, joined by NUL: empty where it has ended, which it may do at any time, or is becoming a program. */
export function argumentsOf(pid: number | string): string {
  return readIfThere(`/proc/${pid}/cmdline`) ?? "";
}

let next = Math.floor(Math.random() * 10_000);

/**
 * A port of loopback that nobody listens on, below those that the kernel gives to whoever asks for any. It is this
 * process's until that ends, for whoever else asks here: the UDP port of that number tells. With `deno run`, which knows
 * no socket that it need not wait for, the process does not end by itself any more.
 */
export async function freePort(): Promise<number> {
  for (;;) {
    const port = 20_000 + next++ % 10_000;
    const claim = createSocket("udp4").bind({ port, address: "127.0.0.1", exclusive: true });
    if (!await once(claim, "listening").then(() => true, () => false)) continue;
    claim.unref();
    const server = createServer().listen(port, "127.0.0.1");
    const free = await once(server, "listening").then(() => true, () => false);
    if (!free) continue;
    server.close();
    await once(server, "close");
    return port;
  }
}
