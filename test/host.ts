/** The real host as a process, and what answers there. */
import assert from "node:assert/strict";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import type { TestContext } from "node:test";
import { stringify } from "smol-toml";
import { cleanup, runMain, temporaryFolder, until } from "./helpers.ts";

/** An API, asked from outside. */
export class Client {
  readonly url: string;

  constructor(url: string) {
    this.url = url;
  }

  async answers(): Promise<boolean> {
    return await fetch(`${this.url}/health`).then(({ ok }) => ok, () => false);
  }

  /** Any answer. */
  async ask(method: string, path: string, body?: unknown): Promise<{ status: number; text: string }> {
    const response = await fetch(this.url + path, {
      method,
      // A connection that is kept may be one to the host before.
      headers: { "content-type": "application/json", connection: "close" },
      ...(body !== undefined && { body: JSON.stringify(body) }),
    });
    return { status: response.status, text: await response.text() };
  }

  /** What is answered below `/instances`. @throws {AssertionError} where it is refused */
  async call<T>(method: string, path: string, body?: unknown): Promise<T> {
    const { status, text } = await this.ask(method, `/instances${path}`, body);
    assert.ok(status < 300, `${method} ${path}: ${status} ${text}`);
    return (text && JSON.parse(text)) as T;
  }
}

/** The real `main.ts` as a process, which a test can kill and start again; its instances go with the last one. */
export class Host extends Client {
  /** Of its `config.toml` and its `data`. */
  readonly folder: string;
  readonly #t: TestContext;
  readonly #config: string;
  #child: ReturnType<typeof runMain> | undefined;

  /** `plugins` are the `[plugins.NAME]` tables, by name, but for `api`, which listens on `port` of loopback. */
  constructor(t: TestContext, port: number, plugins: Record<string, Record<string, unknown>>) {
    super(`http://127.0.0.1:${port}`);
    this.folder = temporaryFolder(t);
    this.#t = t;
    this.#config = join(this.folder, "config.toml");
    const all = { ...plugins, api: { listen: `127.0.0.1:${port}` } };
    writeFileSync(this.#config, stringify({ data_dir: "data", host: { log_level: "warning" }, plugins: all }));
  }

  /** Of the one that runs. */
  get pid(): number {
    return this.#child!.pid!;
  }

  async start(): Promise<void> {
    const child = this.#child = runMain(this.#t, ["--config", this.#config]);
    // Instances outlive a host, so they are deleted by one.
    cleanup(this.#t).defer(async () => {
      if (this.#child !== child) return;
      for (const { id } of await this.call<{ id: string }[]>("GET", "")) await this.call("DELETE", `/${id}`);
      await this.end();
    });
    await until("the host answers", () => this.answers(), 180_000);
  }

  /** kill -9, so that nothing is put in order. */
  async kill(): Promise<void> {
    this.#child!.kill("SIGKILL");
    await this.#child;
    this.#child = undefined;
  }

  /** Has it close. */
  async end(): Promise<void> {
    // Not child.kill(): Deno reports its signal as the end of a child that caught it and exited with 0.
    process.kill(this.pid, "SIGTERM");
    const { exitCode, signal, stderr } = await this.#child!;
    assert.deepEqual([exitCode, signal], [0, undefined], stderr);
    this.#child = undefined;
  }
}
