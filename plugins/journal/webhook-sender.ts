import { setImmediate } from "node:timers";
import type { Logger } from "@logtape/logtape";
import type { Journal, WebhookStats } from "../../main.ts";
import { deadline } from "../shared/async.ts";
import type { Clock } from "../shared/clock.ts";
import { messageOf } from "../shared/errors.ts";
import { Backlog, type Gap, type Lane } from "./webhook-backlog.ts";
import type { Cursors } from "./webhook-cursors.ts";
import { deliveryOf, type Outcome, post, resetOf, type Target } from "./webhook-post.ts";

/** Requests to one receiver at the same time. */
const PARALLEL = 8;
/** Milliseconds before the first retry at the most; each further one doubles it. */
const FIRST = 1_000;
/** Full jitter may come to nothing at all. */
const SHORTEST = 50;
/** Milliseconds that the requests under way are given when the host closes. */
const GRACE = 1_000;

export interface SenderOptions extends Target {
  readonly id: string;
  /** The URL as it may be logged. */
  readonly shown: string;
  readonly types: readonly string[] | undefined;
  readonly maxBackoff: number;
}
export interface SenderParts {
  readonly journal: Journal;
  readonly cursors: Cursors;
  readonly clock: Clock;
  readonly log: Logger;
  /** No request begins once it has aborted. */
  readonly signal: AbortSignal;
  /** From 0 to below 1. */
  readonly random: () => number;
}

/** A lane on its way, or the message about a gap, which has no lane. */
interface Job {
  readonly lane: Lane | undefined;
  failures: number;
  /** A success of another job has called it back from its back-off, which happens once until it succeeds itself. */
  woken: boolean;
  /** `parked`: its head is not there any more, and the receiver is to be told so first. */
  state: "ready" | "sending" | "waiting" | "parked";
  cancel: (() => void) | undefined;
}

/**
 * Sends the events of the journal to one webhook: of each instance one after the other, each until it is taken, and of a
 * few instances at a time. So an instance's events keep their order, and one that the receiver refuses holds up no others.
 */
export class Sender implements AsyncDisposable {
  readonly #options: SenderOptions;
  readonly #parts: SenderParts;
  readonly #backlog: Backlog;
  readonly #jobs = new Set<Job>();
  readonly #ready = new Set<Job>();
  readonly #underWay = new Set<Promise<void>>();
  readonly #abort = new AbortController();
  readonly #following: Disposable;
  readonly #counts = { sent: 0, failed: 0 };
  #failing = 0;
  #scheduled = false;
  #closed = false;
  #cancelRescan: (() => void) | undefined;
  /** There while the receiver has asked to be left alone. */
  #cancelPause: (() => void) | undefined;

  constructor(options: SenderOptions, parts: SenderParts) {
    this.#options = options;
    this.#parts = parts;
    this.#backlog = new Backlog({ ...options, ...parts });
    for (const lane of this.#backlog.lanes) this.#add(lane);
    this.#following = parts.journal.follow(() => {
      this.#backlog.appended();
      this.#schedule();
    });
    parts.signal.addEventListener("abort", this.#stop, { once: true });
    if (parts.signal.aborted) this.#stop();
    this.#schedule();
  }

  /** `sent`, `failed` and `lost` since the host started; `backlog` counts rows of other types that it has yet to scan. */
  stats(): WebhookStats {
    return { url: this.#options.shown, ...this.#backlog.stats(this.#parts.clock.now()), ...this.#counts };
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#stop();
    const ends = Promise.all(this.#underWay);
    // What the receiver is about to confirm is then not sent again by the next host.
    await deadline(ends, GRACE, "A delivery").catch(() => this.#abort.abort(new Error("the host is closing")));
    await ends;
  }

  #stop = (): void => {
    if (this.#closed) return;
    this.#closed = true;
    this.#following[Symbol.dispose]();
    this.#parts.signal.removeEventListener("abort", this.#stop);
    this.#cancelRescan?.();
    this.#cancelPause?.();
    for (const { cancel } of this.#jobs) cancel?.();
  };

  #schedule(): void {
    if (this.#scheduled || this.#closed) return;
    this.#scheduled = true;
    // The action whose commit this follows goes first, and between two batches so does everything else.
    setImmediate(() => {
      this.#scheduled = false;
      if (this.#closed) return;
      try {
        const { opened, more, gap } = this.#backlog.scan();
        for (const lane of opened) this.#add(lane);
        if (more) this.#schedule();
        if (gap) this.#tellGap();
      } catch (error) {
        this.#parts.log.error("Cannot read the journal: {reason}", { reason: messageOf(error), error });
        this.#cancelRescan?.();
        this.#cancelRescan = this.#parts.clock.after(FIRST, () => this.#schedule());
      }
      this.#pump();
    });
  }

  #add(lane: Lane | undefined): void {
    const job: Job = { lane, failures: 0, woken: false, state: "ready", cancel: undefined };
    this.#jobs.add(job);
    this.#ready.add(job);
  }

  #remove(job: Job): void {
    this.#jobs.delete(job);
    if (job.failures > 0) this.#failing--;
    this.#schedule(); // a lane is free
  }

  #makeReady(job: Job): void {
    job.cancel?.();
    job.cancel = undefined;
    job.state = "ready";
    this.#ready.add(job);
  }

  #pump(): void {
    if (this.#closed || this.#cancelPause) return;
    for (const job of this.#ready) {
      if (this.#underWay.size >= PARALLEL) return;
      this.#ready.delete(job);
      job.state = "sending";
      const work = this.#attempt(job).finally(() => {
        this.#underWay.delete(work);
        this.#pump();
      });
      this.#underWay.add(work);
    }
  }

  async #attempt(job: Job): Promise<void> {
    const { clock } = this.#parts;
    const how = { clock, signal: this.#abort.signal };
    let outcome: Outcome;
    try {
      if (job.lane) {
        const row = this.#backlog.read(job.lane);
        if (row === undefined) return this.#remove(job);
        if (row === "gone") {
          job.state = "parked";
          return this.#tellGap();
        }
        outcome = await post(this.#options, deliveryOf(row), how);
        if (outcome.ok) this.#taken(job, job.lane);
      } else {
        const gap = this.#gap();
        if (!gap) return this.#remove(job);
        outcome = await post(this.#options, resetOf(gap, clock.now()), how);
        if (outcome.ok) this.#told(job, gap);
      }
    } catch (error) {
      outcome = { ok: false, reason: messageOf(error) };
    }
    if (!outcome.ok) this.#failed(job, outcome);
  }

  #taken(job: Job, lane: Lane): void {
    this.#counts.sent++;
    this.#succeeded(job);
    if (this.#backlog.taken(lane)) this.#makeReady(job);
    else this.#remove(job);
  }

  #gap(): Gap | undefined {
    const busy = [...this.#jobs].flatMap(({ state, lane }) => state === "sending" && lane ? [lane] : []);
    return this.#backlog.gap(new Set(busy));
  }

  #tellGap(): void {
    if ([...this.#jobs].some(({ lane }) => !lane)) return;
    const gap = this.#gap();
    if (!gap) return;
    const { from, to } = gap;
    const { shown: url } = this.#options;
    this.#parts.log.warn("Events {from} to {to} are gone before webhook {url} has taken them", { from, to, url });
    this.#add(undefined);
  }

  #told(job: Job, gap: Gap): void {
    this.#succeeded(job);
    this.#backlog.told(gap);
    this.#remove(job);
    for (const other of this.#jobs) if (other.state === "parked") this.#makeReady(other);
  }

  #succeeded(job: Job): void {
    if (job.failures > 0 && --this.#failing === 0) {
      this.#parts.log.info("Webhook {url} takes events again", { url: this.#options.shown });
    }
    job.failures = 0;
    job.woken = false;
    // The receiver is back: who waits since it was away need not wait on.
    for (const other of this.#jobs) {
      if (other.state !== "waiting" || other.woken) continue;
      other.woken = true;
      this.#makeReady(other);
    }
  }

  #failed(job: Job, { reason, pause }: Outcome & { ok: false }): void {
    job.state = "waiting";
    if (this.#abort.signal.aborted) return;
    const { clock, log, random } = this.#parts;
    const { shown: url, maxBackoff } = this.#options;
    this.#counts.failed++;
    if (job.failures++ === 0 && this.#failing++ === 0) {
      log.warn("Webhook {url} does not take events: {reason}; they are kept and sent later", { url, reason });
    } else log.debug("Webhook {url} did not take an event: {reason}", { url, reason });
    if (this.#closed) return;
    const longest = Math.min(maxBackoff, FIRST * 2 ** Math.min(job.failures - 1, 30));
    job.cancel = clock.after(Math.max(random() * longest, SHORTEST), () => {
      this.#makeReady(job);
      this.#pump();
    });
    if (pause === undefined) return;
    this.#cancelPause?.();
    this.#cancelPause = clock.after(Math.min(pause, maxBackoff), () => {
      this.#cancelPause = undefined;
      this.#pump();
    });
  }
}
