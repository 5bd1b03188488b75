import * as v from "valibot";
import { type Api, type ApiCall, type Hypervisor, type Instance, STATES } from "../../../main.ts";
import { about } from "../../shared/schemas.ts";
import type { Idempotency } from "../idempotency.ts";
import { jsonList, JsonText } from "../routes.ts";
import { StartBody } from "../schemas.ts";

/** Routes that make, show and change instances. */
export function instanceRoutes(api: Api, hypervisor: Hypervisor, idempotency: Idempotency): void {
  const schemas = () => hypervisor.schemas();
  const shown = { description: "The instance", schema: () => schemas().instance };
  const named = ({ params }: ApiCall): Instance => hypervisor.resolve(params.id);
  const answer = (instance: Instance, status = 200) => ({
    status,
    body: new JsonText(hypervisor.presentJson(instance)),
  });

  api.route({
    method: "POST",
    path: "/instances",
    scope: "instance:write",
    summary: "Create an instance and start it; with an Idempotency-Key header, once for each key in 24 hours",
    body: () => schemas().create,
    bodyChecked: true,
    responses: { 201: shown },
    async handle(call) {
      const { status, text } = await idempotency.once(call, async (detail) => {
        const origin = { ...call.origin, detail: { ...call.origin.detail, ...detail } };
        const instance = await hypervisor.create(call.body, origin);
        return { status: 201, text: hypervisor.presentJson(instance) };
      });
      return { status, body: new JsonText(text) };
    },
  });

  api.route({
    method: "GET",
    path: "/instances",
    scope: "instance:read",
    summary: "List instances, all or those of a state and with all of the given tags",
    query: v.object({
      state: v.optional(about("Only those in it", v.picklist(STATES))),
      tags: v.optional(
        about("Only those that have all of them: tags[key]=value", v.record(v.string(), v.string())),
      ),
    }),
    responses: { 200: { description: "The instances", schema: () => v.array(schemas().instance) } },
    handle({ query }) {
      // Nothing is made for each of thousands of instances but its text, most of which is there already.
      return {
        status: 200,
        body: new JsonText(jsonList(hypervisor.list(query), (instance) => hypervisor.presentJson(instance))),
      };
    },
  });

  api.route({
    method: "GET",
    path: "/instances/:id",
    scope: "instance:read",
    summary: "Show an instance, by id, name or the beginning of its id",
    responses: { 200: shown },
    handle: (call) => answer(named(call)),
  });

  api.route({
    method: "PATCH",
    path: "/instances/:id",
    scope: "instance:write",
    summary: "Change an instance",
    body: () => schemas().update,
    bodyChecked: true,
    responses: { 200: shown },
    handle: async (call) => answer(await hypervisor.update(named(call).id, call.body, call.origin)),
  });

  api.route({
    method: "DELETE",
    path: "/instances/:id",
    scope: "instance:delete",
    summary: "Delete an instance, whatever its state; with graceful_shutdown it is stopped first",
    query: v.object({
      graceful_shutdown: v.optional(about("Whether it is stopped first", v.picklist(["true", "false"]))),
    }),
    responses: { 204: { description: "Deleted" } },
    async handle(call) {
      const { id, state } = named(call);
      const awake = ["Initializing", "Running", "Paused"].includes(state);
      if (awake && call.query.graceful_shutdown === "true") await hypervisor.stop(id, call.origin);
      await hypervisor.delete(id, call.origin);
      return { status: 204 };
    },
  });

  api.route({
    method: "POST",
    path: "/instances/:id/fork",
    scope: "instance:write",
    summary: "Copy an instance that is stopped or in standby, or a running one with from_running",
    body: () => schemas().fork,
    bodyChecked: true,
    responses: { 201: shown },
    handle: async (call) => answer(await hypervisor.fork(named(call).id, call.body, call.origin), 201),
  });

  api.route({
    method: "POST",
    path: "/instances/:id/start",
    scope: "instance:write",
    summary: "Start an instance; entrypoint and cmd replace those it has",
    body: StartBody,
    bodyOptional: true,
    responses: { 200: shown },
    async handle(call) {
      const override = call.body as v.InferOutput<typeof StartBody>;
      // One that replaces nothing may join a start under way.
      const replaces = override.entrypoint !== undefined || override.cmd !== undefined;
      return answer(await hypervisor.start(named(call).id, call.origin, replaces ? override : undefined));
    },
  });
}
