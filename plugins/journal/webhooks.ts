/**
 * The webhooks of the journal: each is sent the rows of its types as JSON, at least once, those of an instance in
 * order. `webhook-backlog.ts` is what one has not been sent and `webhook-cursors.ts` keeps that on disk;
 * `webhook-sender.ts` decides when, and `webhook-post.ts` makes the request.
 */
import { createHash } from "node:crypto";
import type { Logger } from "@logtape/logtape";
import * as v from "valibot";
import { DormouseError, type Hypervisor, type Journal, type Store, type WebhookStats } from "../../main.ts";
import type { Clock } from "../shared/clock.ts";
import { didYouMean } from "../shared/nearest.ts";
import { duration } from "../shared/schemas.ts";
import { ACTIONS } from "../shared/stream-events.ts";
import { Cursors } from "./webhook-cursors.ts";
import { Sender } from "./webhook-sender.ts";

/** One `[[plugins.journal.webhook]]` table. */
export const Webhook = v.object({
  /** Where events are sent by POST, http or https. It names the webhook: one with another URL begins anew. */
  url: v.pipe(
    v.string(),
    v.check((text) => problemOf(text) === undefined, (issue) => problemOf(issue.input)!),
  ),
  /** Actions, types of notes or their names on streams, as `["standby", "health:changed"]`; all when absent. */
  types: v.optional(v.pipe(v.array(v.string()), v.minLength(1))),
  /** Signs each delivery by HMAC-SHA256; without one they are not signed. */
  secret: v.optional(v.pipe(v.string(), v.minLength(1))),
  /** Of one attempt, from the connection to the end of the answer. */
  timeout: v.optional(duration({ min: 1 }), "10s"),
  /** Attempts are made until one succeeds, further and further apart up to this. */
  max_backoff: v.optional(duration({ min: 1_000 }), "5m"),
});
export type Webhook = v.InferOutput<typeof Webhook>;

function problemOf(text: string): string | undefined {
  const url = URL.canParse(text) ? new URL(text) : undefined;
  if (!url || !/^https?:$/.test(url.protocol)) {
    return 'expected an http or https URL such as "https://example.org/hook"';
  }
  // fetch takes none either.
  if (url.username !== "" || url.password !== "") return "expected a URL without user and password";
}

export interface WebhookParts {
  readonly journal: Journal;
  readonly hypervisor: Hypervisor;
  readonly store: Store;
  readonly log: Logger;
  readonly clock: Clock;
  /** The host's: no request begins once it has aborted. */
  readonly signal: AbortSignal;
  /** From 0 to below 1, for the jitter of retries. */
  readonly random?: () => number;
}
export interface Webhooks extends AsyncDisposable {
  stats(): WebhookStats[];
  [Symbol.asyncDispose](): Promise<void>;
}

/**
 * Starts the webhooks of a config. Call it once in `host:ready`, for only then are all types of notes known, and with an
 * empty list too, which forgets those that were removed from the config; close it before the store closes. A webhook
 * that is new begins with the rows that are written from here on. It asks of the journal that `read` with an `instance`
 * is quick (an index on instance and seq) and that `follow` calls when the rows can be read.
 *
 * @throws {DormouseError} `config_invalid` for a type that does not exist, and for a URL that is there twice
 */
export function startWebhooks(parts: WebhookParts, webhooks: readonly Webhook[]): Webhooks {
  check(parts.hypervisor, webhooks);
  const { journal, store, log, clock, signal, random = Math.random } = parts;
  const cursors = new Cursors(store, clock, log);
  const ids = webhooks.map(({ url }) => createHash("sha256").update(new URL(url).href).digest("hex"));
  cursors.keep(ids);
  const names = webhooks.map(({ url }) => nameOf(url));
  const senders = webhooks.map(({ url, types, secret, timeout, max_backoff: maxBackoff }, i) => {
    // Two that differ by their query only still need names of their own.
    const shown = names.indexOf(names[i]) === names.lastIndexOf(names[i])
      ? names[i]
      : `${names[i]}#${ids[i].slice(0, 4)}`;
    const options = { id: ids[i], shown, url, types, secret, timeout, maxBackoff };
    return new Sender(options, { journal, cursors, clock, log, signal, random });
  });
  return {
    stats: () => senders.map((sender) => sender.stats()),
    async [Symbol.asyncDispose]() {
      await Promise.all(senders.map((sender) => sender[Symbol.asyncDispose]()));
      cursors.close();
    },
  };
}

function check(hypervisor: Hypervisor, webhooks: readonly Webhook[]): void {
  const notes = [...hypervisor.noteKinds()].flatMap(([type, { event = type }]) => [type, event]);
  const known = new Set([...ACTIONS, ...notes]);
  const problems: string[] = [];
  const urls = webhooks.map(({ url }) => new URL(url).href);
  webhooks.forEach(({ types = [] }, i) => {
    const path = `plugins.journal.webhook.${i}`;
    if (urls.indexOf(urls[i]) < i) {
      problems.push(`${path}.url: another webhook has it; give it all types, or tell the two apart by a #fragment`);
    }
    for (const type of types.filter((type) => !known.has(type))) {
      const hint = didYouMean(type, known) || "; types of notes are those of the plugins that are turned on";
      problems.push(`${path}.types: unknown type "${type}"${hint}`);
    }
  });
  if (problems.length > 0) throw new DormouseError("config_invalid", problems.join("\n"));
}

// A query may hold a token, and the name goes into logs and metrics.
function nameOf(text: string): string {
  const { origin, pathname, hash } = new URL(text);
  return origin + pathname + hash;
}
