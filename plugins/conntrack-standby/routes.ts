import * as v from "valibot";
import { type Api, type ApiCall, DormouseError, type Hypervisor, type Instance } from "../../main.ts";
import { parseDuration } from "../shared/duration.ts";
import type { Clock } from "../shared/clock.ts";
import type { Controller } from "./controller.ts";
import { isLeaving } from "./entry.ts";
import { type AutoStandby, idleTimeoutOf } from "./policy.ts";
import { Status, statusOf } from "./status.ts";

const HoldBody = v.pipe(
  v.object({
    duration: v.optional(v.pipe(
      v.string(),
      v.check((text) => (parseDuration(text) ?? 0) > 0, 'expected a duration above zero such as "10m"'),
      v.description("How long to stay awake; the policy's idle_timeout when absent"),
    )),
  }),
  v.metadata({ ref: "AutoStandbyHoldRequest" }),
);

export interface RouteParts {
  /** Instances whose standby somebody has asked for and the guards think about. */
  asked: ReadonlySet<string>;
  hypervisor: Hypervisor;
  controller: Controller;
  clock: Clock;
  policyOf(instance: Instance): AutoStandby | undefined;
}

/** `GET .../auto-standby/status`, and `POST` and `DELETE .../auto-standby/hold`. */
export function routes(api: Api, { hypervisor, controller, clock, asked, policyOf }: RouteParts): void {
  const named = ({ params }: ApiCall): Instance => hypervisor.resolve(params.id);
  const responses = { 200: { description: "How it stands with the instance's auto-standby", schema: Status } };
  const answer = (instance: Instance) => {
    const driver = hypervisor.drivers().find(({ name }) => name === instance.driver);
    const supported = driver?.features.has("standby") ?? false;
    const { blind } = controller.sight;
    const [policy, entry] = [policyOf(instance), controller.find(instance.id)];
    return { status: 200, body: statusOf({ instance, policy, entry, supported, blind, now: clock.now() }) };
  };

  api.route({
    method: "GET",
    path: "/instances/:id/auto-standby/status",
    scope: "instance:read",
    summary: "Show whether an instance is in use, when it goes to standby, and what keeps it from that",
    responses,
    handle: (call) => answer(named(call)),
  });

  api.route({
    method: "POST",
    path: "/instances/:id/auto-standby/hold",
    scope: "instance:write",
    summary: "Keep an instance from going to standby by itself for a while; the last hold replaces those before it",
    body: HoldBody,
    bodyOptional: true,
    responses,
    handle(call) {
      const instance = named(call);
      const entry = controller.find(instance.id);
      // Nothing is waited for between this and the hold, so what is held is awake.
      if (asked.has(instance.id) || isLeaving(instance) || entry?.tracker.attempt?.phase === "committed") {
        throw tooLate(instance);
      }
      const timeout = idleTimeoutOf(policyOf(instance));
      if (entry === undefined || timeout === undefined) return answer(instance);
      const { duration } = call.body as v.InferOutput<typeof HoldBody>;
      controller.hold(entry, duration === undefined ? timeout : parseDuration(duration)!);
      return answer(instance);
    },
  });

  api.route({
    method: "DELETE",
    path: "/instances/:id/auto-standby/hold",
    scope: "instance:write",
    summary: "Release the hold of an instance, if it has one",
    responses,
    handle(call) {
      const instance = named(call);
      const entry = controller.find(instance.id);
      if (entry) controller.release(entry);
      return answer(instance);
    },
  });
}

function tooLate({ name, state, transition }: Instance): DormouseError {
  const doing = transition === null ? "" : ` (${transition} under way)`;
  return new DormouseError("instance_in_standby", `Cannot hold instance "${name}": state is ${state}${doing}`);
}
