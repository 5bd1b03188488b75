/** One attempt to hand an event to a webhook: what is sent, how it is signed, and what an answer means. */
import { createHmac } from "node:crypto";
import { type JournalRow, VERSION } from "../../main.ts";
import type { Clock } from "../shared/clock.ts";
import { formatDuration } from "../shared/duration.ts";
import { messageOf } from "../shared/errors.ts";

/** An answer is read so far, which lets its connection be used again; who sends more has it closed. */
const MAX_ANSWER = 16 * 1024;

/** What is sent. `id` is the same for each attempt, so that a receiver can tell what it has had before. */
export interface Delivery {
  readonly id: string;
  readonly event: string;
  readonly body: string;
}
export interface Target {
  readonly url: string;
  /** Undefined for deliveries without a signature. */
  readonly secret: string | undefined;
  /** Of an attempt, from the connection to the end of the answer, in milliseconds. */
  readonly timeout: number;
}
/** `pause`: the receiver asks to be left alone for so many milliseconds, by everything that is sent to it. */
export type Outcome = { readonly ok: true } | { readonly ok: false; readonly reason: string; readonly pause?: number };

/** A row of the journal. Nothing of the instance itself is in it but its id and name: an environment holds secrets. */
export function deliveryOf(row: JournalRow): Delivery {
  const { seq, type, event, at, instance_id, instance_name, from, to, actor, cause, summary, detail } = row;
  const ts = new Date(at).toISOString();
  const about = { instance: instance_id, name: instance_name, from, to, actor, cause, summary, detail };
  return { id: String(seq), event, body: JSON.stringify({ seq, type, event, ts, ...about }) };
}

/** In the place of events that are gone: those `from` one `to` another, of some instances, or of any where it is null. */
export function resetOf(gap: { from: number; to: number; instances: readonly string[] | null }, at: number): Delivery {
  const [type, event] = ["reset", "reset"];
  const { from: first, to: last, instances } = gap;
  const detail = { from: first, to: last, instances };
  const summary = `Events ${first} to ${last} are gone from the journal and were not sent`;
  const about = { instance: null, name: null, from: null, to: null, actor: "system", cause: "pruned", summary };
  const body = JSON.stringify({ seq: null, type, event, ts: new Date(at).toISOString(), ...about, detail });
  return { id: `reset-${first}-${last}`, event, body };
}

/**
 * The header `Dormouse-Signature`, `t=SECONDS,v1=HEX`: HMAC-SHA256 by the secret over `SECONDS.BODY`. The time is the
 * attempt's, so that a receiver can refuse what somebody kept and sends again.
 */
export function signatureOf(secret: string, body: string, now: number): string {
  const t = Math.floor(now / 1000);
  return `t=${t},v1=${createHmac("sha256", secret).update(`${t}.${body}`).digest("hex")}`;
}

/** Sends it once. Only a 2xx is a success; redirects are not followed. Never rejects. */
export async function post(
  { url, secret, timeout }: Target,
  { id, event, body }: Delivery,
  { clock, signal }: { clock: Clock; signal: AbortSignal },
): Promise<Outcome> {
  const ended = new AbortController();
  const late = () => ended.abort(new Error(`no answer within ${formatDuration(timeout)}`));
  const stop = () => ended.abort(signal.reason);
  const cancel = clock.after(timeout, late);
  signal.addEventListener("abort", stop, { once: true });
  if (signal.aborted) stop();
  try {
    const response = await fetch(url, {
      method: "POST",
      redirect: "manual",
      headers: {
        "Content-Type": "application/json",
        "User-Agent": `Dormouse/${VERSION}`,
        // A header takes no other characters; the body has the name as it is.
        "Dormouse-Event": event.replace(/[^\x21-\x7e]+/g, "?"),
        "Dormouse-Delivery": id,
        ...(secret !== undefined && { "Dormouse-Signature": signatureOf(secret, body, clock.now()) }),
      },
      body,
      signal: ended.signal,
    });
    await drain(response);
    return outcomeOf(response, clock.now());
  } catch (error) {
    return { ok: false, reason: ended.signal.aborted ? messageOf(ended.signal.reason) : reasonOf(error, url) };
  } finally {
    cancel();
    signal.removeEventListener("abort", stop);
  }
}

function outcomeOf({ status, type, ok, headers }: Response, now: number): Outcome {
  if (ok) return { ok };
  if (type === "opaqueredirect" || (status >= 300 && status < 400)) {
    return { ok: false, reason: `answered with a redirect${status > 0 ? ` (${status})` : ""}, which is not followed` };
  }
  // Gone may be a mistake of the receiver's next release: it is asked as seldom as there is, but nothing is dropped.
  const pause = status === 410 ? Infinity : retryAfter(headers.get("Retry-After"), now);
  return { ok: false, reason: `answered ${status}`, ...(pause !== undefined && { pause }) };
}

/** Milliseconds of a Retry-After header, which holds seconds or a date (RFC 9110, 10.2.3). */
export function retryAfter(value: string | null, now: number): number | undefined {
  if (value === null) return undefined;
  if (/^\d+$/.test(value.trim())) return Number(value) * 1000;
  // Date.parse takes nearly anything, "-1" too; a date of HTTP begins with its day.
  const date = /^[A-Z][a-z]+, /.test(value) ? Date.parse(value) : NaN;
  return Number.isNaN(date) ? undefined : Math.max(date - now, 0);
}

async function drain({ body, ok }: Response): Promise<void> {
  if (!body) return;
  const reader = body.getReader();
  try {
    for (let read = 0; read <= MAX_ANSWER;) {
      const { done, value } = await reader.read();
      if (done) return;
      read += value.byteLength;
    }
    await reader.cancel();
  } catch (error) {
    // It has said that it took the event; how the rest of its answer ends changes nothing.
    if (!ok) throw error;
  }
}

// Both runtimes say why in the cause. Deno names the URL there, which may hold a token: it is left out of what is logged.
function reasonOf(error: unknown, url: string): string {
  const { cause } = error as { cause?: { message?: string; code?: string } };
  const text = cause?.message || cause?.code || messageOf(error);
  const { href, hash } = new URL(url);
  const bare = href.slice(0, href.length - hash.length);
  return [href, bare].reduce((rest, each) => rest.replaceAll(` for url (${each})`, ""), text).slice(0, 200);
}
