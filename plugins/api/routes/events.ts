import * as v from "valibot";
import { type Api, DormouseError, type EventStream, type Host, type Hypervisor } from "../../../main.ts";
import { messageOfChange, messageOfNote, parseTypes } from "../../shared/stream-events.ts";

const Journal = v.optional(v.pipe(v.string(), v.description("Needs the plugin journal")));
const Query = v.object({
  instance: v.optional(v.pipe(v.string(), v.description("An id, a name or the beginning of an id"))),
  type: v.optional(v.pipe(v.string(), v.description("A comma-separated list of actions and types of notes"))),
  since: Journal,
  format: Journal,
  limit: Journal,
});
const EventLine = v.pipe(
  v.string(),
  v.description("Events with `id: SEQ`, `event: ACTION` and the change as JSON; `lagged` and `reset` tell of a gap"),
);

interface Filter {
  id: string | undefined;
  types: string[] | undefined;
}

/** `GET /events` where no journal is on: every change and note from now on, as it is committed. */
export function liveEvents(api: Api, hypervisor: Hypervisor, hooks: Host["hooks"]): void {
  api.route({
    method: "GET",
    path: "/events",
    scope: "instance:read",
    summary: "Stream every change from now on, of all instances or one, of all actions or some",
    query: Query,
    responses: { 200: { description: "The changes", type: "text/event-stream", schema: EventLine } },
    long: true,
    handle(call) {
      const { instance, type, ...rest } = call.query as v.InferOutput<typeof Query>;
      const [past] = Object.keys(rest);
      if (past !== undefined) {
        const message = `Cannot use query "${past}": turn on its plugin with [plugins.journal] in the config`;
        throw new DormouseError("feature_off", message, { details: { query: past, plugin: "journal" } });
      }
      const id = instance === undefined ? undefined : hypervisor.resolve(instance).id;
      const types = type === undefined ? undefined : parseTypes(type, hypervisor.noteKinds());
      const last = call.headers.get("Last-Event-ID");
      return api.stream(call, (stream) => follow(stream, last, { id, types }));
    },
  });

  // The queue of the subscription is what bounds memory: a handler is done when the client has taken what it sent.
  async function follow(stream: EventStream, last: string | null, { id, types }: Filter) {
    const { promise: ended, resolve: end } = Promise.withResolvers<void>();
    const wanted = (instance: string, ...names: string[]) =>
      (id === undefined || instance === id) && (types === undefined || names.some((name) => types.includes(name)));
    const options = {
      consumer: "api-events",
      lagged: (gap: { from: number; to: number }) => stream.send({ event: "lagged", data: JSON.stringify(gap) }),
    };
    using _changes = hooks.on("instance:event", (event) => {
      if (!wanted(event.instance_id, event.action)) return;
      const { instance, to } = event;
      const shown = to === null ? "null" : hypervisor.presentJson(instance);
      return stream.send(messageOfChange({ ...event, instance_name: instance.name }, shown));
    }, options);
    using _notes = hooks.on("note:event", (note) => {
      if (wanted(note.instance_id, note.type, note.event)) return stream.send(messageOfNote(note));
    }, options);
    stream.signal.addEventListener("abort", () => end(), { once: true });
    // What came after that id cannot be told from here, and saying nothing would look like nothing had happened.
    if (last !== null) await stream.send({ event: "reset", data: JSON.stringify({ last_event_id: last }) });
    if (!stream.signal.aborted) await ended;
  }
}
