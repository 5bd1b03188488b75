import { existsSync, mkdirSync, mkdtempSync, readdirSync, renameSync, rmSync } from "node:fs";
import { join } from "node:path";
import type { Logger } from "@logtape/logtape";
import { messageOf } from "../shared/errors.ts";
import { run } from "../shared/run.ts";

export interface PackagesOptions {
  log: Logger;
  signal?: AbortSignal;
}

/** Milliseconds for the lists or for one package to arrive. */
const TRANSFER_MS = 300_000;

/**
 * Debian packages of this machine's own sources, fetched by `apt-get` and unpacked, never installed. It needs no root: what
 * is fetched is kept in `cache`, with lists of what there is where the machine has none that are good.
 */
export class Packages {
  readonly #cache: string;
  readonly #options: PackagesOptions;
  /** Arguments that put apt's own files where we keep them, once the machine's own lists were of no use. */
  #ownLists: string[] = [];

  constructor(cache: string, options: PackagesOptions) {
    this.#cache = cache;
    this.#options = options;
    mkdirSync(cache, { recursive: true });
  }

  /** Names of the packages that these say they cannot do without, alternatives included, each once. */
  async dependencies(names: readonly string[]): Promise<string[]> {
    const text = await this.#withLists(() => this.#run("apt-cache", ["depends", "--important", ...names]));
    const found = [...text.matchAll(/^[ |]+(?:Pre)?Depends: ([^<\s]+)$/gm)].map(([, dependency]) => dependency);
    return [...new Set(found)];
  }

  /**
   * Unpacks packages into a folder.
   *
   * @throws {CommandError} where one is not to be had
   */
  async unpack(names: readonly string[], folder: string): Promise<void> {
    for (const file of await this.#withLists(() => this.#fetch(names))) {
      await this.#run("dpkg-deb", ["--extract", file, folder]);
    }
  }

  /** The paths of the packages' files. All at once: apt needs a second or more to read its lists each time it is called. */
  async #fetch(names: readonly string[]): Promise<string[]> {
    // In a folder of its own first: what is in the cache is complete.
    const folder = mkdtempSync(join(this.#cache, "fetch-"));
    try {
      const listed = await this.#run("apt-get", ["-qq", "download", "--print-uris", ...names], folder);
      const files = new Map([...listed.matchAll(/^'[^']*' (([^_\s]+)_\S+) /gm)].map(([, file, name]) => [name, file]));
      const missing = names.filter((name) => !existsSync(join(this.#cache, files.get(name) ?? name)));
      if (missing.length > 0) {
        this.#options.log.info("Fetching packages {names}", { names: missing.join(", ") });
        await this.#run("apt-get", ["-qq", "download", ...missing], folder);
        for (const file of readdirSync(folder)) renameSync(join(folder, file), join(this.#cache, file));
      }
      return names.map((name) => join(this.#cache, files.get(name)!));
    } finally {
      rmSync(folder, { recursive: true, force: true });
    }
  }

  /** Does `work`, and once more with lists of our own where the machine's are absent or name files that are gone. */
  async #withLists<T>(work: () => Promise<T>): Promise<T> {
    try {
      return await work();
    } catch (error) {
      this.#options.signal?.throwIfAborted();
      if (this.#ownLists.length > 0) throw error;
      this.#options.log.info("Fetching lists of packages: {reason}", { reason: messageOf(error) });
      const lists = join(this.#cache, "lists");
      mkdirSync(join(lists, "partial"), { recursive: true });
      const own = ["-o", `Dir::State::Lists=${lists}`, "-o", `Dir::Cache=${join(this.#cache, "apt")}`];
      mkdirSync(join(this.#cache, "apt", "archives", "partial"), { recursive: true });
      await this.#run("apt-get", [...own, "-qq", "update"]);
      this.#ownLists = own;
      return await work();
    }
  }

  #run(program: string, args: string[], cwd?: string): Promise<string> {
    const { signal } = this.#options;
    const all = program === "dpkg-deb" ? args : [...this.#ownLists, ...args];
    return run(program, all, { timeout: TRANSFER_MS, ...(signal && { signal }), ...(cwd && { cwd }) });
  }
}
