import assert from "node:assert/strict";
import { createServer, type IncomingHttpHeaders, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import type { TestContext } from "node:test";
import { definePlugin, type Journal, type Plugin } from "../../main.ts";
import { journalPlugin } from "../../plugins/journal/mod.ts";
import { ManualClock } from "../clock.ts";
import { cleanup, temporaryFolder } from "../helpers.ts";
import { ORIGIN, registryHost, ScriptedDriver } from "../hypervisor/scripted.ts";

export interface Delivered {
  readonly path: string;
  readonly headers: IncomingHttpHeaders;
  readonly raw: string;
  readonly body: Record<string, unknown>;
}
/** A status, or what answers by itself. */
type Answer = number | ((response: ServerResponse) => void);

/** A real HTTP server that keeps what it is sent and answers as a test says. */
export class Receiver implements AsyncDisposable {
  /** Every request, answered or not. */
  readonly requests: Delivered[] = [];
  /** Those that were answered with 2xx. */
  readonly taken: Delivered[] = [];
  answer: (delivered: Delivered) => Answer | Promise<Answer> = () => 204;
  /** Requests that are not answered yet, and the most of them there were. */
  open = 0;
  widest = 0;
  #watchers = new Set<() => void>();
  #server = createServer(async (request, response) => {
    this.widest = Math.max(this.widest, ++this.open);
    let raw = "";
    try {
      for await (const part of request.setEncoding("utf8")) raw += part;
    } catch {
      this.open--; // the sender has run out of patience
      return;
    }
    const { url = "", headers } = request;
    const delivered = { path: url, headers, raw, body: JSON.parse(raw) };
    this.requests.push(delivered);
    this.#changed();
    const answer = await this.answer(delivered);
    this.open--;
    if (typeof answer === "function") answer(response);
    else {
      if (answer < 300) this.taken.push(delivered);
      response.writeHead(answer).end();
    }
    this.#changed();
  });

  get url(): string {
    return `http://127.0.0.1:${(this.#server.address() as AddressInfo).port}`;
  }

  /** The numbers of the events that it took, each once, in the order of their first delivery. */
  get seqs(): number[] {
    return [...new Set(this.taken.map(({ body }) => body.seq as number))];
  }

  async listen(port = 0): Promise<void> {
    await new Promise<void>((resolve) => this.#server.listen(port, "127.0.0.1", resolve));
  }

  /** Resolves once it is so, which is looked at after each request and answer; the test's own deadline bounds it. */
  async when(condition: (receiver: this) => boolean): Promise<void> {
    await new Promise<void>((resolve) => {
      const check = () => {
        if (!condition(this)) return;
        this.#watchers.delete(check);
        resolve();
      };
      this.#watchers.add(check);
      check();
    });
  }

  #changed(): void {
    for (const watcher of [...this.#watchers]) watcher();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#server.closeAllConnections();
    await new Promise<void>((resolve) => this.#server.close(() => resolve()));
  }
}

export async function receiver(t: TestContext): Promise<Receiver> {
  const made = cleanup(t).use(new Receiver());
  await made.listen();
  return made;
}

/** Declares the notes that tests write. */
export const noting = definePlugin({
  name: "noting",
  requires: ["hypervisor"],
  setup(host) {
    const notes = host.use("hypervisor").declareNotes({
      "test:noted": { help: "A test says so" },
      "test:named": { help: "A test says so, under another name", event: "test.named" },
    });
    host.defer(() => notes[Symbol.dispose]());
  },
}) as Plugin;

export interface WorldOptions {
  /** The data of a world before, for a restart. */
  before?: { folder: string; driver: ScriptedDriver };
  clock?: ManualClock;
  table?: Record<string, unknown>;
}

/** The real store, registry and journal with webhooks, and a clock that passes when a test says so. */
export async function world(t: TestContext, webhooks: Record<string, unknown>[], options: WorldOptions = {}) {
  const { clock = new ManualClock(Date.now()), table = {} } = options;
  const { folder, driver } = options.before ?? { folder: temporaryFolder(t), driver: new ScriptedDriver() };
  const plugins = [noting, journalPlugin(clock) as Plugin];
  // On a busy machine a clock that a test drives is faster than any request, so that is no time-out's own test.
  const webhook = webhooks.map((each) => ({ timeout: "1h", ...each }));
  const tables = { journal: { webhook, ...table } };
  const { host, hypervisor } = await registryHost(t, { folder, driver, plugins, tables });
  const journal: Journal = host.use("journal");
  return {
    host,
    hypervisor,
    journal,
    clock,
    folder,
    driver,
    instance: (name: string, body = {}) => hypervisor.create({ name, image: "any", ...body }, ORIGIN),
    /** Writes an event about the instance; its number. */
    note: (id: string, type = "test:noted", detail = {}): number =>
      hypervisor.note(id, { type, origin: ORIGIN, summary: "As the test says", detail })!.seq,
    stats: (index = 0) => journal.stats().webhooks[index],
  };
}

/** Lets the clock pass, a step at a time and what follows from each, until it is so. */
export async function passUntil(clock: ManualClock, condition: () => boolean, step = 1_000): Promise<void> {
  for (let i = 0; !condition(); i++) {
    if (i > 5_000) throw new Error("Not within 5000 steps of the clock");
    await clock.pass(step);
    await new Promise((resolve) => setTimeout(resolve, 1)); // a request over loopback takes real time
  }
}

/** Each instance's events, each where it came first, are in order. */
export function assertOrdered(delivered: readonly Delivered[]): void {
  for (const instance of new Set(delivered.map(({ body }) => body.instance))) {
    const own = delivered.filter(({ body }) => body.instance === instance && body.seq !== null);
    const firsts = [...new Set(own.map(({ body }) => body.seq as number))];
    assert.deepEqual(firsts, firsts.toSorted((a, b) => a - b), String(instance));
  }
}
