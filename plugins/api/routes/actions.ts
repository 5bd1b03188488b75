import type { Api, Hypervisor, StandbyRequest } from "../../../main.ts";
import { JsonText } from "../routes.ts";
import { StandbyBody } from "../schemas.ts";

const ACTIONS = {
  stop: "Stop an instance",
  pause: "Pause an instance: it stays in memory and does not run",
  resume: "Let a paused instance run on",
  standby: "Put an instance to standby",
  restore: "Wake an instance that is in standby",
} as const;

const STANDBY_CODES = {
  compression: "invalid_snapshot_compression",
  compression_delay: "invalid_compression_delay",
} as const;

/** Routes that take an instance from one state to another. One that is there already is answered as it is. */
export function actionRoutes(api: Api, hypervisor: Hypervisor): void {
  for (const [action, summary] of Object.entries(ACTIONS) as [keyof typeof ACTIONS, string][]) {
    api.route({
      method: "POST",
      path: `/instances/:id/${action}`,
      scope: "instance:write",
      summary,
      ...(action === "standby" && { body: StandbyBody, bodyOptional: true, codes: STANDBY_CODES }),
      responses: { 200: { description: "The instance", schema: () => hypervisor.schemas().instance } },
      async handle({ params, origin, body }) {
        const { id } = hypervisor.resolve(params.id);
        const instance = await hypervisor[action](id, origin, body as StandbyRequest | undefined);
        return { status: 200, body: new JsonText(hypervisor.presentJson(instance)) };
      },
    });
  }
}
