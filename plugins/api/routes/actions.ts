import type { Api, Hypervisor } from "../../../main.ts";
import { JsonText } from "../routes.ts";
import { StandbyBody } from "../schemas.ts";

const ACTIONS = {
  stop: "Stop an instance",
  pause: "Pause an instance: it stays in memory and does not run",
  resume: "Let a paused instance run on",
  standby: "Put an instance to standby",
  restore: "Wake an instance that is in standby",
} as const;

/** Routes that take an instance from one state to another. One that is there already is answered as it is. */
export function actionRoutes(api: Api, hypervisor: Hypervisor): void {
  for (const [action, summary] of Object.entries(ACTIONS) as [keyof typeof ACTIONS, string][]) {
    api.route({
      method: "POST",
      path: `/instances/:id/${action}`,
      scope: "instance:write",
      summary,
      ...(action === "standby" && { body: StandbyBody, bodyOptional: true }),
      responses: { 200: { description: "The instance", schema: () => hypervisor.schemas().instance } },
      async handle({ params, origin }) {
        const { id } = hypervisor.resolve(params.id);
        return { status: 200, body: new JsonText(hypervisor.presentJson(await hypervisor[action](id, origin))) };
      },
    });
  }
}
