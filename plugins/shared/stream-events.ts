/** How changes and notes look to clients that follow them, live or from the journal. */
import type { Action, EventStream, LifecycleEvent, Note, NoteKind } from "../../main.ts";
import { DormouseError } from "./errors.ts";
import { didYouMean } from "./nearest.ts";

export const ACTIONS = Object.keys(
  {
    create: 0,
    update: 0,
    start: 0,
    stop: 0,
    pause: 0,
    resume: 0,
    standby: 0,
    restore: 0,
    delete: 0,
    fork: 0,
    state: 0,
  } satisfies Record<Action, 0>,
);

type Message = Parameters<EventStream["send"]>[0];
export type ChangeView = Omit<LifecycleEvent, "instance"> & { readonly instance_name: string };
export type NoteView = Omit<Note, "instance">;

/** A change; `instance` is the JSON of the instance as it was at the commit, `null` once it is deleted. */
export function changeJson(change: ChangeView, instance: string): string {
  const { seq, at, action, instance_id, instance_name, from, to, actor, cause, detail } = change;
  const fields = { seq, at: new Date(at).toISOString(), action, instance_id, instance_name };
  const text = JSON.stringify({ ...fields, from, to, actor, cause, detail });
  return `${text.slice(0, -1)},"instance":${instance}}`;
}

/** A note, in the envelope `{ type, instance, ts, summary, detail }` with who did it and why. */
export function noteJson({ event, instance_id, at, summary, detail, seq, actor, cause }: NoteView): string {
  const ts = new Date(at).toISOString();
  return JSON.stringify({ type: event, instance: instance_id, ts, summary, detail, seq, actor, cause });
}

export function messageOfChange(change: ChangeView, instance: string): Message {
  return { id: String(change.seq), event: change.action, data: changeJson(change, instance) };
}

export function messageOfNote(note: NoteView): Message {
  return { id: String(note.seq), event: note.event, data: noteJson(note) };
}

/**
 * The types of a comma-separated filter: actions, types of notes, and their names on streams.
 *
 * @throws {DormouseError} `invalid_request` for one that does not exist
 */
export function parseTypes(text: string, kinds: ReadonlyMap<string, NoteKind>): string[] {
  const known = new Set([...ACTIONS, ...[...kinds].flatMap(([type, { event = type }]) => [type, event])]);
  const types = text.split(",").map((type) => type.trim());
  const unknown = types.find((type) => !known.has(type));
  if (unknown === undefined) return types;
  const message = `Cannot filter events: type is "${unknown.slice(0, 100)}"${didYouMean(unknown, known)}`;
  throw new DormouseError("invalid_request", message);
}
