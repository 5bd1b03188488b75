/**
 * The plugin `journal`: what happened, as rows in the database. `rows.ts` is the table and how it grows and shrinks
 * (`retention.ts` says when), `reader.ts` how it is read; `streams.ts` sends it to clients, who share `tail.ts`,
 * `pages.ts` shows it in pages, `routes.ts` has both; `webhooks.ts` sends it to others.
 *
 * A row is written by the commit hooks, so in the transaction of its change or note: neither is ever there without the
 * other. Its id is their `seq`, which has no gaps, so whoever knows the last id that he has seen can go on from there.
 */
import * as v from "valibot";
import { definePlugin, type Host, type Journal } from "../../main.ts";
import { type Clock, systemClock } from "../shared/clock.ts";
import { duration, size } from "../shared/schemas.ts";
import { Reader } from "./reader.ts";
import { Retention } from "./retention.ts";
import { routes } from "./routes.ts";
import { Rows } from "./rows.ts";
import { Streams } from "./streams.ts";
import { Tail } from "./tail.ts";
import { startWebhooks, Webhook } from "./webhooks.ts";

const Options = v.object({
  /** How long events are kept. */
  max_age: v.optional(duration({ min: 1 }), "168h"),
  /** How many are kept. */
  max_rows: v.optional(v.pipe(v.number(), v.integer(), v.minValue(1)), 100_000),
  /** About how much of the database they may fill: an event has the instance as it was, so about 1 kB. */
  max_size: v.optional(size({ min: 1 }), "256MB"),
  /** A client that does not take an event for so long is disconnected; it can go on where it was. */
  slow_client_timeout: v.optional(duration({ min: 1 }), "30s"),
  /** Where events are sent to. */
  webhook: v.optional(v.array(Webhook), []),
});
type Options = v.InferOutput<typeof Options>;

/** After all others, so that an event shows what they have made of the instance in the same transaction. */
const LAST = Number.MIN_SAFE_INTEGER;

export default journalPlugin(systemClock);

/** The plugin on a clock; tests hand in one of their own. */
export function journalPlugin(clock: Clock) {
  return definePlugin<Options>({
    name: "journal",
    requires: ["store", "hypervisor", "api?"],
    provides: ["journal"],
    options: Options,
    setup: (host, options) => setUp(host, options, clock),
  });
}

function setUp(host: Host, options: Options, clock: Clock): void {
  const { hooks, log, signal } = host;
  const [store, hypervisor, api] = [host.use("store"), host.use("hypervisor"), host.find("api")];
  const rows = new Rows({ store, log, present: (instance) => hypervisor.presentJson(instance) });
  const reader = new Reader(store.db, () => rows.last);
  hooks.commit("instance:commit", (context) => rows.change(context), { priority: LAST });
  hooks.commit("note:commit", (note) => rows.note(note), { priority: LAST });

  const tail = new Tail(reader, () => rows.last);
  const streams = new Streams({ rows, reader, tail, clock, log, timeout: options.slow_client_timeout });
  if (api) routes(api, { hypervisor, rows, reader, streams });
  const retention = new Retention(rows, options, { clock, log });
  host.defer(() => retention[Symbol.dispose]());

  let webhooks: ReturnType<typeof startWebhooks> | undefined;
  const journal: Journal = {
    read: (query) => reader.read(query),
    get first() {
      return rows.first;
    },
    get last() {
      return rows.last;
    },
    follow: (listener) => rows.follow(listener),
    stats: () => ({
      rows: rows.count,
      pruned: rows.pruned,
      streams: streams.open,
      webhooks: webhooks?.stats() ?? [],
    }),
  };
  host.provide("journal", journal);
  // Every plugin has said by then which notes there are.
  hooks.guard("host:ready", () => {
    webhooks = startWebhooks({ journal, hypervisor, store, log, clock, signal }, options.webhook);
    const started = webhooks;
    host.defer(async () => await started[Symbol.asyncDispose]());
  });
}
