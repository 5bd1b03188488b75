import { request } from "node:http";
import type { TestContext } from "node:test";
import {
  type Api,
  definePlugin,
  type Hypervisor,
  type Journal,
  type Note,
  type NoteKind,
  type Plugin,
  type RunningHost,
  type Store,
} from "../../main.ts";
import api from "../../plugins/api/mod.ts";
import hypervisor from "../../plugins/hypervisor/mod.ts";
import { journalPlugin } from "../../plugins/journal/mod.ts";
import store from "../../plugins/store.ts";
import { systemClock } from "../../plugins/shared/clock.ts";
import type { ManualClock } from "../clock.ts";
import { startWith } from "../helpers.ts";
import { ORIGIN, ScriptedDriver } from "../hypervisor/scripted.ts";

export const KINDS: Record<string, NoteKind> = {
  "test:note": { help: "What a test says" },
  lazy_start: { help: "A note with another name on streams", event: "container.lazy_started" },
};

export interface World {
  host: RunningHost;
  hypervisor: Hypervisor;
  journal: Journal;
  api: Api;
  store: Store;
  driver: ScriptedDriver;
  /** A GET, with the body as text and parsed where it is JSON. */
  get(path: string, headers?: Record<string, string>): Promise<Answer>;
  /** A new instance with its first four events: create, state, start, or so. */
  create(name: string): Promise<string>;
  note(id: string, summary: string, detail?: Record<string, unknown>): Note;
}
export interface Answer {
  status: number;
  text: string;
  body: Page & { code: string; message: string; details: Record<string, unknown> };
}
export interface Page {
  events: Record<string, unknown>[];
  next: number;
  more: boolean;
  reset?: true;
  first: number;
  last: number;
}

export interface WorldOptions {
  folder?: string;
  /** The `[plugins.journal]` table; null for a host without the journal. */
  table?: Record<string, unknown> | null;
  clock?: ManualClock;
  driver?: ScriptedDriver;
  plugins?: Plugin[];
}

/** A host with the real store, registry, API on a free port of loopback and journal, and the scripted driver. */
export async function world(t: TestContext, options: WorldOptions = {}): Promise<World> {
  const { driver = new ScriptedDriver(), clock = systemClock, table = {}, plugins = [], folder } = options;
  const parts: { store?: Store } = {};
  const scripted = definePlugin({
    name: "scripted",
    requires: ["store", "hypervisor"],
    setup(host) {
      parts.store = host.use("store");
      const registered = host.use("hypervisor").register(driver);
      host.defer(() => registered[Symbol.dispose]());
      host.use("hypervisor").declareNotes(KINDS);
    },
  });
  const journals = table === null ? [] : [journalPlugin(clock)];
  const tables = {
    hypervisor: { default_driver: "scripted" },
    api: { listen: "127.0.0.1:0", access_log: false },
    journal: table ?? {},
  };
  const all = [store, hypervisor, scripted, api, ...journals, ...plugins] as Plugin[];
  const host = await startWith(t, all, { tables, ...(folder && { folder }) });
  const registry = host.use("hypervisor");
  const get: World["get"] = async (path, headers = {}) => {
    const response = await fetch(host.use("api").url + path, { headers });
    const text = await response.text();
    return { status: response.status, text, body: JSON.parse(text) };
  };
  return {
    host,
    hypervisor: registry,
    journal: host.use("journal"),
    api: host.use("api"),
    store: parts.store!,
    driver,
    get,
    create: async (name) => (await registry.create({ name, image: "any" }, ORIGIN)).id,
    note: (id, summary, detail = {}) => registry.note(id, { type: "test:note", origin: ORIGIN, summary, detail })!,
  };
}

/** A message of a stream, with the bytes it came as. */
export interface Message {
  raw: string;
  event: string;
  id: string;
  data: string;
}

/** A client on a connection of its own, which it can let go of at any byte. */
export class Client {
  readonly messages: Message[] = [];
  /** The id to go on from, by the rules of EventSource: that of the last message that is complete. */
  lastId: string | undefined;
  ended = false;
  status = 0;
  #text = "";
  #wake = () => {};
  readonly #request;

  constructor(url: string, { lastId, cutAfter = Infinity }: { lastId?: string; cutAfter?: number } = {}) {
    this.lastId = lastId;
    const headers = lastId === undefined ? {} : { "Last-Event-ID": lastId };
    let left = cutAfter;
    this.#request = request(url, { agent: false, headers }, (response) => {
      this.status = response.statusCode!;
      response.on("data", (chunk: Uint8Array) => {
        const taken = chunk.subarray(0, left);
        left -= taken.length;
        this.#take(taken);
        if (left <= 0) this.leave();
      });
      response.on("error", () => this.#end());
      response.on("close", () => this.#end());
    });
    this.#request.on("error", () => this.#end());
    this.#request.end();
  }

  /** Resolves once `enough` is so or the connection has ended. */
  async until(enough: (client: this) => boolean): Promise<void> {
    while (!this.ended && !enough(this)) await new Promise<void>((resolve) => this.#wake = resolve);
  }

  /** The messages, once there are so many. */
  async got(count: number): Promise<Message[]> {
    await this.until(({ messages }) => messages.length >= count);
    return this.messages;
  }

  leave(): void {
    this.#request.destroy();
    this.#end();
  }

  readonly #decoder = new TextDecoder();
  #take(chunk: Uint8Array): void {
    if (this.ended) return;
    this.#text += this.#decoder.decode(chunk, { stream: true });
    for (let end = this.#text.indexOf("\n\n"); end >= 0; end = this.#text.indexOf("\n\n")) {
      const raw = this.#text.slice(0, end);
      this.#text = this.#text.slice(end + 2);
      if (raw.startsWith(":")) continue;
      const fields = Object.fromEntries(raw.split("\n").map((line) => /^(\w+): (.*)$/s.exec(line)!.slice(1)));
      if (fields.id !== undefined) this.lastId = fields.id;
      this.messages.push({ raw, ...fields } as unknown as Message);
    }
    this.#wake();
  }

  #end(): void {
    this.ended = true;
    this.#wake();
  }
}
