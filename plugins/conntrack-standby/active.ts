import type { Flow, FlowKind } from "../../main.ts";

/** All that is over. Every other state is live, those without a name here included. */
const FINISHED: ReadonlySet<string> = new Set(["NONE", "TIME_WAIT", "CLOSE"]);
const HALF_OPEN: ReadonlySet<string> = new Set(["SYN_SENT", "SYN_SENT2", "SYN_RECV"]);

/** Where the dumps of the kernel's table stand, shared by all who merge them with events. */
export interface Epoch {
  /** The number of the dump that began last. */
  latest: number;
  /** Dumps that have begun and are not merged yet. */
  underWay: number;
}

interface Entry {
  state: string;
  /** `dead` ones are in the kernel's table and do not count: half-open for too long, or left over from before a stop. */
  is: "open" | "half-open" | "dead";
  /** `epoch.latest` at the last event about it; 0 where it is known from a dump. */
  touched: number;
}

/** The flows to one instance, from events and dumps. Constant time per event. */
export class ActiveFlows {
  readonly #epoch: Epoch;
  readonly #entries = new Map<string, Entry>();
  /** When each half-open flow was seen first, the oldest first. */
  readonly #halfOpen = new Map<string, number>();
  /** Flows that ended during the dump that is under way, which may still show them. */
  readonly #gone = new Set<string>();
  #goneDuring = 0;
  #open = 0;

  constructor(epoch: Epoch) {
    this.#epoch = epoch;
  }

  /** Flows that keep the instance awake. */
  get live(): number {
    return this.#open + this.#halfOpen.size;
  }

  /** Takes an event in; whether it was about a live flow. */
  event(kind: FlowKind, flow: Flow, now: number, visible: (flow: Flow) => boolean): boolean {
    const key = keyOf(flow);
    const known = this.#entries.get(key);
    if (!known && !visible(flow)) return false;
    // About something else than the connection's state, such as its mark: it revives nothing that is over.
    if (kind === "update" && flow.protocol === "tcp" && flow.state === "") {
      return known !== undefined && known.is !== "dead";
    }
    if (kind === "destroy" || isFinished(flow)) {
      if (known) this.#remove(key, known);
      if (this.#epoch.underWay > 0) this.#ended(key);
      return false;
    }
    // A flow that is new to the kernel has nothing to do with a dead one that had its ports.
    if (known && kind === "new" && known.is === "dead") this.#remove(key, known);
    return this.#put(key, flow.state, now, this.#epoch.latest);
  }

  /**
   * Merges a dump, the `epoch`th: it is right about every flow that no event has told of since it began. Whether it
   * shows a live flow that was not known.
   */
  sync(flows: readonly Flow[] | undefined, epoch: number, now: number, visible: (flow: Flow) => boolean): boolean {
    let found = false;
    if (this.#entries.size > 0 || flows) {
      const shown = new Set<string>();
      for (const flow of flows ?? []) {
        if (isFinished(flow)) continue;
        const key = keyOf(flow);
        shown.add(key);
        const known = this.#entries.get(key);
        if (known ? known.touched >= epoch : !visible(flow) || this.#hasEnded(key, epoch)) continue;
        if (known?.is === "dead" && known.state === flow.state) continue;
        const before = this.live;
        found = this.#put(key, flow.state, now, 0) && this.live > before || found;
      }
      for (const [key, entry] of this.#entries) {
        if (!shown.has(key) && entry.touched < epoch) this.#remove(key, entry);
      }
    }
    this.#gone.clear();
    return found;
  }

  /** Half-open flows count for `maxAge` milliseconds from when they were seen first, however often they are tried again. */
  expire(now: number, maxAge: number): void {
    for (const [key, since] of this.#halfOpen) {
      if (since > now) this.#halfOpen.set(key, now); // the clock stepped back
      else if (since > now - maxAge) break;
      else this.#kill(key);
    }
  }

  /** Nothing that is known now counts any more until an event tells that it lives. */
  forsake(): void {
    for (const key of this.#entries.keys()) this.#kill(key);
  }

  clear(): void {
    this.#entries.clear();
    this.#halfOpen.clear();
    this.#open = 0;
  }

  #ended(key: string): void {
    if (this.#goneDuring !== this.#epoch.latest) this.#gone.clear();
    this.#goneDuring = this.#epoch.latest;
    this.#gone.add(key);
  }

  #hasEnded(key: string, epoch: number): boolean {
    return this.#goneDuring >= epoch && this.#gone.has(key);
  }

  #put(key: string, state: string, now: number, touched: number): boolean {
    let entry = this.#entries.get(key);
    const half = HALF_OPEN.has(state);
    if (!entry) this.#entries.set(key, entry = { state, is: "dead", touched });
    else if (entry.is === "dead" && half) return (entry.state = state, entry.touched = touched, false);
    entry.state = state;
    entry.touched = touched;
    const is = half ? "half-open" : "open";
    if (entry.is === is) return true;
    if (entry.is === "open") this.#open--;
    if (half) this.#halfOpen.set(key, now);
    else {
      this.#halfOpen.delete(key);
      this.#open++;
    }
    entry.is = is;
    return true;
  }

  #kill(key: string): void {
    const entry = this.#entries.get(key)!;
    if (entry.is === "open") this.#open--;
    this.#halfOpen.delete(key);
    entry.is = "dead";
  }

  #remove(key: string, entry: Entry): void {
    this.#entries.delete(key);
    this.#halfOpen.delete(key);
    if (entry.is === "open") this.#open--;
  }
}

function isFinished({ protocol, state }: Flow): boolean {
  return protocol === "tcp" && FINISHED.has(state);
}

// The destination is the instance itself, and the form of the source tells IPv4 from IPv6.
function keyOf({ protocol, source, source_port, destination_port }: Flow): string {
  return `${protocol === "tcp" ? "" : "u"}${source_port}>${destination_port} ${source}`;
}
