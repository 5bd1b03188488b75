import { setImmediate as turn } from "node:timers/promises";
import * as v from "valibot";
import { type Hypervisor, STATES } from "../../main.ts";
import { ACTIONS } from "../shared/stream-events.ts";
import type { Frame, Reader } from "./reader.ts";
import type { Rows } from "./rows.ts";

export const PAGE_AT_MOST = 1000;
/** A page ends early when it has more bytes than this; a row may have a megabyte. */
const PAGE_BYTES = 4 * 1024 * 1024;

const Time = v.pipe(v.string(), v.isoTimestamp());
const State = v.nullable(v.picklist(STATES));
const Seq = v.pipe(v.number(), v.integer(), v.description("Its place in the one sequence of all changes and notes"));
const Origin = { actor: v.string(), cause: v.string(), detail: v.record(v.string(), v.unknown()) };

const NoteEvent = v.pipe(
  v.object({
    type: v.string(),
    instance: v.pipe(v.string(), v.description("The instance's id")),
    ts: Time,
    summary: v.pipe(v.string(), v.description("One line for people")),
    seq: Seq,
    ...Origin,
  }),
  v.metadata({ ref: "NoteEvent" }),
);

/** The schema of a page; complete once every plugin has added its fields to instances. */
export function pageSchema(hypervisor: Hypervisor): v.GenericSchema {
  const ChangeEvent = v.pipe(
    v.object({
      seq: Seq,
      at: Time,
      action: v.picklist(ACTIONS),
      instance_id: v.string(),
      instance_name: v.string(),
      from: State,
      to: State,
      ...Origin,
      instance: v.nullable(hypervisor.schemas().instance),
    }),
    v.metadata({ ref: "ChangeEvent" }),
  );
  return v.pipe(
    v.object({
      events: v.pipe(
        v.array(v.union([ChangeEvent, NoteEvent])),
        v.description("As the stream has them, in order"),
      ),
      next: v.pipe(v.number(), v.description("The `since` of the page after this one, also where that is yet to come")),
      more: v.pipe(v.boolean(), v.description("Whether there are more already")),
      reset: v.optional(v.pipe(
        v.literal(true),
        v.description("Events right after `since` are not kept any more, or `since` is of another history"),
      )),
      first: v.pipe(v.number(), v.description("The lowest `seq` from which on nothing is missing")),
      last: v.pipe(v.number(), v.description("The `seq` of the last event of all")),
    }),
    v.metadata({ ref: "EventPage" }),
  );
}

export interface PageWish {
  /** Undefined for the oldest that are kept. */
  since: number | undefined;
  limit: number;
  instance: string | undefined;
  wants(frame: Frame): boolean;
}

/** A page of the journal as JSON text. */
export async function pageOf(rows: Rows, reader: Reader, { since, limit, instance, wants }: PageWish): Promise<string> {
  const { first } = rows;
  const lost = since !== undefined && (since > rows.last || since + 1 < first);
  let next = since === undefined || since > rows.last ? 0 : since;
  let [text, found, more] = ["", 0, false];
  while (!more) {
    const { frames, to } = reader.window(next, instance);
    for (const frame of frames) {
      if (!wants(frame)) continue;
      if (found === limit || text.length > PAGE_BYTES) {
        more = true;
        break;
      }
      text += found++ === 0 ? frame.message.data : `,${frame.message.data}`;
      next = frame.seq;
    }
    if (!more) next = to;
    if (more || to >= rows.last) break;
    // Long scans must not hold up everybody else.
    await turn();
  }
  const tail = JSON.stringify({ next, more, ...(lost && { reset: true }), first, last: rows.last });
  return `{"events":[${text}],${tail.slice(1)}`;
}
