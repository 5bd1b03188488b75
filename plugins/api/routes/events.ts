import * as v from "valibot";
import { type Action, type Api, type Host, type Hypervisor, type LifecycleEvent } from "../../../main.ts";
import { didYouMean } from "../../shared/nearest.ts";
import type { Stream, Streams } from "../sse.ts";

const ACTIONS = Object.keys(
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

const Query = v.object({
  instance: v.optional(v.pipe(v.string(), v.description("An id, a name or the beginning of an id"))),
  type: v.optional(v.pipe(
    v.string(),
    v.description(`A comma-separated list of ${ACTIONS.join(", ")}`),
    v.rawCheck(({ dataset, addIssue }) => {
      const unknown = dataset.typed && dataset.value.split(",").find((action) => !ACTIONS.includes(action));
      if (typeof unknown === "string") {
        addIssue({ message: `expected actions, "${unknown}" is none${didYouMean(unknown, ACTIONS)}` });
      }
    }),
  )),
});
const EventLine = v.pipe(
  v.string(),
  v.description("Events with `id: SEQ`, `event: ACTION` and the change as JSON; `lagged` and `reset` tell of a gap"),
);

/** `GET /events`: every change as it is committed. */
export function eventRoutes(api: Api, hypervisor: Hypervisor, streams: Streams, hooks: Host["hooks"]): void {
  api.route({
    method: "GET",
    path: "/events",
    scope: "instance:read",
    summary: "Stream every change from now on, of all instances or one, of all actions or some",
    query: Query,
    responses: { 200: { description: "The changes", type: "text/event-stream", schema: EventLine } },
    long: true,
    handle(call) {
      const { instance, type } = call.query as v.InferOutput<typeof Query>;
      const id = instance === undefined ? undefined : hypervisor.resolve(instance).id;
      const actions = type?.split(",");
      const wanted = (event: LifecycleEvent) =>
        (id === undefined || event.instance_id === id) && (actions?.includes(event.action) ?? true);
      const last = call.headers.get("Last-Event-ID");
      return streams.answer(call, (stream) => follow(stream, last, wanted));
    },
  });

  // The queue of the subscription is what bounds memory: a handler is done when the client has taken what it sent.
  async function follow(stream: Stream, last: string | null, wanted: (event: LifecycleEvent) => boolean) {
    const { promise: ended, resolve: end } = Promise.withResolvers<void>();
    using _subscription = hooks.on(
      "instance:event",
      (event) => wanted(event) ? stream.send(messageOf(event)) : undefined,
      { consumer: "api-events", lagged: (gap) => stream.send({ event: "lagged", data: JSON.stringify(gap) }) },
    );
    stream.signal.addEventListener("abort", () => end(), { once: true });
    // What came after that id cannot be told from here, and saying nothing would look like nothing had happened.
    if (last !== null) await stream.send({ event: "reset", data: JSON.stringify({ last_event_id: last }) });
    if (!stream.signal.aborted) await ended;
  }

  function messageOf(event: LifecycleEvent) {
    const { seq, action, instance, instance_id, from, to, actor, cause, detail } = event;
    const fields = { seq, at: new Date(event.at).toISOString(), action, instance_id, instance_name: instance.name };
    const text = JSON.stringify({ ...fields, from, to, actor, cause, detail });
    const shown = to === null ? "null" : hypervisor.presentJson(instance);
    return { id: String(seq), event: action, data: `${text.slice(0, -1)},"instance":${shown}}` };
  }
}
