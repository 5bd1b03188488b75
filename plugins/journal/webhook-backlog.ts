import type { Journal, JournalRow } from "../../main.ts";
import type { Cursor, Cursors, LaneCursor } from "./webhook-cursors.ts";

/** Instances whose events wait in lanes. Further ones wait in the journal, so this bounds memory, and retries too. */
const LANES = 64;
/** Rows that are read at once. */
const BATCH = 64;

/** The events of one instance that are to be sent, of which nothing but their place in the journal is held here. */
export interface Lane extends LaneCursor {
  head: number;
  until: number;
  pending: number;
  at: number;
  /** The event after `head`, as of when that was read: it may be pruned while `head` is under way. */
  following: number | undefined;
  /** Events of it have been pruned. */
  gapped: boolean;
}
/** Events `from` one `to` another that are not there and were not sent, of some instances or of any where it is null. */
export interface Gap {
  readonly from: number;
  readonly to: number;
  readonly instances: readonly string[] | null;
  /** Up to where, by lane; and the scan's own, where it has come upon one. */
  readonly lanes: ReadonlyMap<Lane, number>;
  readonly scan: number | undefined;
}
export interface BacklogOptions {
  readonly id: string;
  readonly types: readonly string[] | undefined;
  readonly journal: Journal;
  readonly cursors: Cursors;
}

/**
 * What a webhook has not been sent. A scan goes over the journal and opens a lane for each instance that has something;
 * a lane's rows are read one by one when their turn comes. All of it is a few numbers for each lane, on disk too.
 */
export class Backlog {
  readonly #options: BacklogOptions;
  readonly #lanes = new Map<string, Lane>();
  /** Where the scan goes on. */
  #next: number;
  /** Whether the journal may have rows that were not scanned. */
  #behind: boolean;
  /** The row at `next` is not there, which the receiver has yet to be told. */
  #gapped = false;
  #lost = 0;

  /** A webhook that is not on disk begins with what happens from now on. */
  constructor(options: BacklogOptions) {
    this.#options = options;
    const { id, journal, cursors } = options;
    const stored = cursors.load(id);
    this.#next = stored?.next ?? journal.last + 1;
    this.#behind = this.#next <= journal.last;
    for (const lane of stored?.lanes ?? []) this.#open(lane);
    // At once: what happens from here on is for it, even if the host dies before the next write.
    if (!stored) cursors.now(id, this.#cursor());
  }

  get lanes(): Iterable<Lane> {
    return this.#lanes.values();
  }

  /** Rows were written. */
  appended(): void {
    this.#behind = true;
  }

  /**
   * Puts a bounded number of rows into lanes; tells which are new, and whether to go on with another call. `gap` where
   * it does not go on before the receiver has been told of one.
   */
  scan(): { opened: Lane[]; more: boolean; gap: boolean } {
    const { journal } = this.#options;
    const opened: Lane[] = [];
    const free = LANES - this.#lanes.size;
    if (!this.#behind || free === 0 || this.#gapped) return { opened, more: false, gap: this.#gapped };
    const limit = Math.min(4 * free, BATCH);
    const rows = journal.read({ after: this.#next - 1, limit });
    const before = this.#next;
    let full = false;
    for (const row of rows) {
      // The numbers have no gaps: one that is not there is pruned, or the journal was off.
      this.#gapped = row.seq !== this.#next;
      full = !this.#gapped && this.#wants(row) && !this.#take(row, opened);
      if (full || this.#gapped) break;
      this.#next++;
    }
    if (rows.length === 0) this.#gapped = this.#next <= journal.last;
    if (this.#next !== before) this.#save();
    this.#behind = this.#next <= journal.last;
    return { opened, more: this.#behind && !full && !this.#gapped, gap: this.#gapped };
  }

  /** The row that the lane has to send next, read anew; `gone` where it is not there, undefined at the end of the lane. */
  read(lane: Lane): JournalRow | "gone" | undefined {
    const [row, following] = this.#rowsOf(lane, 2);
    if (this.#isGone(lane, row)) return "gone";
    // What is not there and not pruned is no event of its types any more: the config is another one.
    if (!row) return void this.#end(lane);
    lane.head = row.seq;
    lane.at = row.at;
    lane.following = following?.seq;
    return row;
  }

  #rowsOf({ head, until, instance }: Lane, limit: number): JournalRow[] {
    const { journal, types } = this.#options;
    const rows = head > until ? [] : journal.read({ after: head - 1, limit, instance, ...(types && { types }) });
    return rows.filter(({ seq }) => seq <= until);
  }

  #isGone({ head, until }: Lane, row: JournalRow | undefined): boolean {
    return head <= until && row?.seq !== head && head < this.#options.journal.first;
  }

  /** The receiver has taken the row that was read last. Whether the lane has another one. */
  taken(lane: Lane): boolean {
    lane.pending--;
    if (lane.following === undefined) this.#end(lane);
    else {
      lane.head = lane.following;
      lane.following = undefined;
      this.#save();
    }
    return this.#lanes.get(lane.instance) === lane;
  }

  /** What is not there any more and was not sent; the lanes of `busy` are left out, whose heads are under way. */
  gap(busy: ReadonlySet<Lane>): Gap | undefined {
    const { journal } = this.#options;
    const lanes = new Map<Lane, number>();
    for (const lane of this.#lanes.values()) {
      if (busy.has(lane) || lane.head >= journal.first) continue;
      const [row] = this.#rowsOf(lane, 1);
      // What the journal still has of others is yet to come, whatever this one lacks.
      if (this.#isGone(lane, row)) lanes.set(lane, Math.min(row ? row.seq - 1 : lane.until, journal.first - 1));
    }
    const scan = this.#scanGap();
    if (lanes.size === 0 && scan === undefined) return undefined;
    const from = Math.min(...[...lanes.keys()].map(({ head }) => head), scan === undefined ? Infinity : this.#next);
    const to = Math.max(...lanes.values(), scan ?? 0);
    const instances = scan === undefined ? [...lanes.keys()].map(({ instance }) => instance) : null;
    return { from, to, instances, lanes, scan };
  }

  // It may lie where the scan has not come to yet, for all lanes are taken: one message is to tell of all there is.
  #scanGap(): number | undefined {
    const { journal } = this.#options;
    if (this.#next > journal.last || this.#next >= journal.first) return undefined;
    const [found] = journal.read({ after: this.#next - 1, limit: 1 });
    this.#gapped = found?.seq !== this.#next;
    return this.#gapped ? (found?.seq ?? journal.last + 1) - 1 : undefined;
  }

  /** The receiver has been told of a gap. */
  told({ lanes, scan }: Gap): void {
    for (const [lane, to] of lanes) {
      lane.gapped = true;
      lane.head = to + 1;
    }
    if (scan !== undefined) {
      this.#lost += scan - this.#next + 1;
      this.#next = scan + 1;
      this.#gapped = false;
    }
    this.#save();
  }

  stats(now: number): { backlog: number; lag_ms: number; lost: number } {
    const { journal } = this.#options;
    const lanes = [...this.#lanes.values()];
    const unscanned = journal.last - this.#next + 1;
    const [waiting] = lanes.length === 0 && unscanned > 0 ? journal.read({ after: this.#next - 1, limit: 1 }) : [];
    const oldest = Math.min(waiting?.at ?? now, ...lanes.map(({ at }) => at));
    const backlog = lanes.reduce((sum, { pending }) => sum + pending, unscanned);
    return { backlog, lag_ms: Math.max(now - oldest, 0), lost: this.#lost };
  }

  #wants({ type, event }: JournalRow): boolean {
    const { types } = this.#options;
    return types === undefined || types.includes(type) || types.includes(event);
  }

  #take({ seq, instance_id: instance, at }: JournalRow, opened: Lane[]): boolean {
    const lane = this.#lanes.get(instance);
    if (lane) {
      lane.until = seq;
      lane.pending++;
      lane.following ??= seq;
    } else if (this.#lanes.size < LANES) opened.push(this.#open({ instance, head: seq, until: seq, pending: 1, at }));
    else return false;
    return true;
  }

  #open({ instance, head, until, pending, at }: LaneCursor): Lane {
    const lane = { instance, head, until, pending, at, following: undefined, gapped: false };
    this.#lanes.set(instance, lane);
    return lane;
  }

  #end(lane: Lane): void {
    this.#lanes.delete(lane.instance);
    if (lane.gapped) this.#lost += lane.pending;
    this.#save();
  }

  #cursor = (): Cursor => ({ next: this.#next, lanes: this.#lanes.values() });

  #save(): void {
    this.#options.cursors.later(this.#options.id, this.#cursor);
  }
}
