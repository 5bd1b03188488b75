import * as v from "valibot";
import { type Api, type ApiCall, DormouseError, type Hypervisor } from "../../main.ts";
import { parseTypes } from "../shared/stream-events.ts";
import { PAGE_AT_MOST, pageOf, pageSchema } from "./pages.ts";
import type { Frame, Reader } from "./reader.ts";
import type { Rows } from "./rows.ts";
import type { Streams } from "./streams.ts";

const Whole = v.pipe(v.string(), v.regex(/^\d+$/, "expected a whole number"));
const Since = v.optional(v.pipe(Whole, v.description("Events with a `seq` above it")));
const Limit = v.optional(v.pipe(
  Whole,
  v.check((text) => Number(text) >= 1 && Number(text) <= PAGE_AT_MOST, `expected 1 to ${PAGE_AT_MOST}`),
  v.description("Events of a page; 100 when absent"),
));
const Type = v.optional(v.pipe(
  v.string(),
  v.description("A comma-separated list of actions, types of notes, or their names on streams"),
));
const PageQuery = v.object({ since: Since, limit: Limit, type: Type });
const EventsQuery = v.object({
  ...PageQuery.entries,
  instance: v.optional(v.pipe(v.string(), v.description("An id, a name or the beginning of an id"))),
  format: v.optional(v.pipe(
    v.picklist(["sse", "json"]),
    v.description("`sse`, which is also meant when absent: a stream. `json`: a page"),
  )),
});
type EventsQuery = v.InferOutput<typeof EventsQuery>;

const EventLine = v.pipe(
  v.string(),
  v.description(
    "Events with `id: SEQ`, `event: TYPE` and JSON as in a page; `reset` with `{ last_event_id, first, last }` where " +
      "events after the given id are not kept any more",
  ),
);

export interface RouteParts {
  hypervisor: Hypervisor;
  rows: Rows;
  reader: Reader;
  streams: Streams;
}

/** `GET /events` and `GET /instances/{id}/events`. */
export function routes(api: Api, { hypervisor, rows, reader, streams }: RouteParts): void {
  const page = () => pageSchema(hypervisor);

  api.route({
    method: "GET",
    path: "/events",
    scope: "instance:read",
    summary: "Stream every event, after the id in `Last-Event-ID` or `since` or from now on; or page through them",
    query: EventsQuery,
    responses: {
      200: {
        description: "The events",
        type: "text/event-stream",
        schema: EventLine,
        also: { "application/json": page },
      },
    },
    long: true,
    handle(call) {
      const { instance, format, since, limit, type } = call.query as EventsQuery;
      const filter = { instance: instance === undefined ? undefined : idOf(instance), wants: wantedTypes(type) };
      if (format === "json") return answer(filter, since, limit);
      if (limit !== undefined) {
        throw new DormouseError("invalid_request", 'Wrong value of "limit": expected none without format=json', {
          details: { field: "limit" },
        });
      }
      // The header wins, unless it is empty, which is no id: a client that reconnects sends it with the URL of its first connection.
      return streams.answer(api, call, { ...filter, last: call.headers.get("Last-Event-ID") || since });
    },
  });

  api.route({
    method: "GET",
    path: "/instances/:id/events",
    scope: "instance:read",
    summary: "Page through the events of an instance, by its full id also once it is deleted",
    query: PageQuery,
    responses: { 200: { description: "A page of events", schema: page } },
    handle({ params, query }: ApiCall) {
      const { since, limit, type } = query as v.InferOutput<typeof PageQuery>;
      return answer({ instance: idOf(params.id), wants: wantedTypes(type) }, since, limit);
    },
  });

  async function answer(
    filter: { instance: string | undefined; wants(frame: Frame): boolean },
    since: string | undefined,
    limit = "100",
  ): Promise<Response> {
    const wish = { ...filter, since: since === undefined ? undefined : Number(since), limit: Number(limit) };
    return new Response(await pageOf(rows, reader, wish), { headers: { "Content-Type": "application/json" } });
  }

  /** @throws {DormouseError} `not_found`, `ambiguous` */
  function idOf(reference: string): string {
    try {
      return hypervisor.resolve(reference).id;
    } catch (error) {
      // What is deleted has a history for as long as its rows are kept.
      if (error instanceof DormouseError && error.code === "not_found" && rows.count > 0 && reader.knows(reference)) {
        return reference;
      }
      throw error;
    }
  }

  /** @throws {DormouseError} `invalid_request` */
  function wantedTypes(text: string | undefined): (frame: Frame) => boolean {
    if (text === undefined) return () => true;
    const types = new Set(parseTypes(text, hypervisor.noteKinds()));
    return ({ type, event }) => types.has(type) || types.has(event);
  }
}
