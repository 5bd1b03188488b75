import { DormouseError } from "../../main.ts";
import { formatDuration } from "../shared/duration.ts";
import { messageOf } from "../shared/errors.ts";
import type { Entry } from "./entry.ts";
import { type Acquired, Flight } from "./flight.ts";
import type { Parts } from "./keeper.ts";
import { raise } from "./raise.ts";

/** Codes of what was refused before anything was begun, or has nothing to do with the instance. */
const QUIET = ["invalid_state", "not_found", "not_lazy", "shutting_down"];

export interface AcquiresOptions extends Parts {
  maxLeases: number;
  save(entry: Entry): void;
  settled(entry: Entry): void;
}

/** Makes instances ready for who acquires them: one flight at a time for each, joined by all who want the same. */
export class Acquires {
  readonly #options: AcquiresOptions;
  readonly #closing = new AbortController();
  readonly #flights = new Set<Promise<void>>();

  constructor(options: AcquiresOptions) {
    this.#options = options;
  }

  /**
   * Resolves once the instance is ready. Who leaves (`signal`) gets no lease, and ends the flight for nobody else.
   *
   * @throws {DormouseError} why the instance is not ready; `lazy_start_timeout`, `insufficient_resources`
   */
  async acquire(entry: Entry, ttl: number, signal: AbortSignal): Promise<Acquired> {
    const { maxLeases } = this.#options;
    this.#closing.signal.throwIfAborted();
    signal.throwIfAborted();
    if (entry.leases.size + (entry.flight?.waiting ?? 0) >= maxLeases) {
      const message = `Cannot acquire instance "${
        this.#name(entry)
      }": it has ${maxLeases} leases, the most it may have`;
      throw new DormouseError("insufficient_resources", message);
    }
    if (entry.flight) return await entry.flight.join(ttl, signal);
    const instance = this.#options.hypervisor.find(entry.id);
    const flight = entry.flight = new Flight(instance?.state !== "Running" || entry.stopping !== undefined);
    const joined = flight.join(ttl, signal);
    const flown = this.#fly(entry, flight).finally(() => this.#flights.delete(flown));
    this.#flights.add(flown);
    return await joined;
  }

  /** Nobody waits from here on. */
  async close(): Promise<void> {
    this.#closing.abort(new DormouseError("shutting_down", "Cannot acquire: the host is closing"));
    await Promise.all(this.#flights);
  }

  async #fly(entry: Entry, flight: Flight): Promise<void> {
    const { hypervisor, hooks, clock, log, settled } = this.#options;
    const { startTimeout: timeout } = entry.terms;
    const late = new AbortController();
    const cancel = clock.after(timeout, () => late.abort(this.#late(entry, timeout)));
    const signal = AbortSignal.any([late.signal, this.#closing.signal]);
    try {
      await raise(entry.id, { hypervisor, hooks, clock, timeout, signal });
      this.#land(entry, flight);
    } catch (error) {
      entry.flight = undefined;
      this.#fail(entry, flight, error);
    } finally {
      cancel();
    }
    try {
      settled(entry);
    } catch (error) {
      log.error("Looking at instance {id} failed: {reason}", { id: entry.id, reason: messageOf(error), error });
    }
  }

  /** From here to the answers nothing is waited for, so who is told of a lease has one, of an instance that runs. */
  #land(entry: Entry, flight: Flight): void {
    const { clock, notes, save } = this.#options;
    if (entry.gone) {
      throw new DormouseError("not_lazy", `Cannot acquire instance "${this.#name(entry)}": it is not lazy any more`);
    }
    const now = clock.now();
    const before = entry.granted;
    entry.flight = undefined;
    entry.failed = false;
    entry.freeSince = now;
    flight.land((ttl) => entry.leases.grant(ttl, now), (leases) => {
      entry.granted += leases.length;
      try {
        if (!flight.raised) return save(entry);
        if (notes.started(entry.id, performance.now() - flight.began, () => save(entry))) return;
        throw new DormouseError("not_found", `No instance "${entry.id}": it was deleted`);
      } catch (error) {
        for (const { id } of leases) entry.leases.release(id, now);
        entry.granted = before;
        throw error;
      }
    });
  }

  #fail(entry: Entry, flight: Flight, error: unknown): void {
    const { clock, notes, save, log } = this.#options;
    const code = error instanceof DormouseError ? error.code : "internal_error";
    entry.freeSince = clock.now();
    try {
      if (QUIET.includes(code) || !flight.starts) save(entry);
      else {
        entry.failed = true;
        notes.startFailed(entry.id, messageOf(error), () => save(entry));
      }
    } catch (second) {
      log.error("Noting a failed start of {id} failed: {reason}", {
        id: entry.id,
        reason: messageOf(second),
        error: second,
      });
    }
    flight.fail(error);
  }

  #late(entry: Entry, timeout: number): DormouseError {
    const message = `Cannot acquire instance "${this.#name(entry)}": it was not ready within ${
      formatDuration(timeout)
    }`;
    return new DormouseError("lazy_start_timeout", message);
  }

  #name({ id }: Entry): string {
    return this.#options.hypervisor.find(id)?.name ?? id;
  }
}
