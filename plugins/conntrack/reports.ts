import type { Logger } from "@logtape/logtape";
import type { Flow, FlowKind } from "../../main.ts";
import { messageOf } from "../shared/errors.ts";
import type { ConntrackListener } from "./flow.ts";

/** Tells the listener, and stands between it and the source: what it throws is logged and counted. */
export class Reports {
  events = 0;
  errors = 0;
  overflows = 0;
  disconnects = 0;
  connected = false;
  readonly #listener: ConntrackListener;
  readonly #log: Logger;
  #closed = false;
  #reason: string | undefined;

  constructor(listener: ConntrackListener, log: Logger) {
    this.#listener = listener;
    this.#log = log;
  }

  /** Nothing is told any more. */
  close(): void {
    this.#closed = true;
    this.connected = false;
  }

  // Without a closure per event: this is the path of 100,000 a second.
  readonly event = (kind: FlowKind, flow: Flow): void => {
    if (this.#closed) return;
    this.events++;
    try {
      this.#listener.event(kind, flow);
    } catch (error) {
      this.#failed("event", error);
    }
  };

  isConnected(): void {
    if (this.#closed) return;
    this.connected = true;
    if (this.#reason !== undefined) this.#log.info("Conntrack events come again");
    this.#reason = undefined;
    this.#tell("connected", () => this.#listener.connected());
  }

  overflow(): void {
    if (this.#closed) return;
    this.overflows++;
    this.#lost("overflow");
  }

  ended(reason: string): void {
    if (this.#closed) return;
    this.disconnects++;
    // A cause that stays is told once, not at every attempt.
    if (reason !== this.#reason) this.#log.warn("Conntrack events are interrupted: {reason}", { reason });
    this.#reason = reason;
    this.#lost(reason);
  }

  #lost(reason: string): void {
    this.connected = false;
    this.#tell("lost", () => this.#listener.lost(reason));
  }

  #tell(method: string, call: () => void): void {
    try {
      call();
    } catch (error) {
      this.#failed(method, error);
    }
  }

  #failed(method: string, error: unknown): void {
    this.errors++;
    const reason = messageOf(error);
    this.#log.error("Conntrack listener failed at {method}: {reason}", { method, reason, error });
  }
}

/** Its part of a source's statistics; zeros before the start. */
export function told(reports: Reports | undefined) {
  const { connected = false, events = 0, overflows = 0, disconnects = 0, errors = 0 } = reports ?? {};
  return { connected, events, overflows, disconnects, listener_errors: errors };
}
