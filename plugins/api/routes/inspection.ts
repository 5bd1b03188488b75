import type * as v from "valibot";
import { type Api, type ApiCall, type Hypervisor, type Instance, type State } from "../../../main.ts";
import { delay } from "../../shared/async.ts";
import { parseDuration } from "../../shared/duration.ts";
import type { Execs } from "../execs.ts";
import * as schemas from "../schemas.ts";

const MAX_OUTPUT = 1024 * 1024;
const DEFAULT_TIMEOUT = 60_000;
/** How long an answer waits for a driver that finds no log to say so; then the stream is open, and it may follow. */
const FIRST_LINE_WITHIN = 250;

/** Routes that look into instances: wait, logs, stats, stat and exec. */
export function inspectionRoutes(api: Api, hypervisor: Hypervisor, execs: Execs): void {
  const named = ({ params }: ApiCall): Instance => hypervisor.resolve(params.id);

  api.route({
    method: "GET",
    path: "/instances/:id/wait",
    scope: "instance:read",
    summary: "Wait until an instance is in a state, cannot get there by itself any more, or the timeout is over",
    query: schemas.WaitQuery,
    codes: { state: "invalid_state_name", timeout: "invalid_timeout" },
    responses: { 200: { description: "Where the instance is now", schema: schemas.WaitAnswer } },
    long: true,
    async handle(call) {
      const { state, timeout } = call.query as { state: State; timeout?: string };
      const ms = timeout === undefined ? DEFAULT_TIMEOUT : Math.min(parseDuration(timeout)!, schemas.WAIT_AT_MOST);
      const body = await hypervisor.wait(named(call).id, state, { timeout: ms, signal: call.signal });
      return { status: 200, body };
    },
  });

  api.route({
    method: "GET",
    path: "/instances/:id/logs",
    scope: "instance:read",
    summary: "Stream the last lines of a log, and with follow those to come; each event's data is a JSON string",
    query: schemas.LogsQuery,
    responses: { 200: { description: "The lines", type: "text/event-stream", schema: schemas.LogLine } },
    long: true,
    async handle(call) {
      const instance = named(call);
      const { tail = "100", follow, source = "app" } = call.query as v.InferOutput<typeof schemas.LogsQuery>;
      const left = new AbortController();
      const signal = AbortSignal.any([call.signal, left.signal]);
      const request = { source, tail: Number(tail), follow: follow === "true", signal };
      const lines = hypervisor.driverOf(instance, "logs").logs(instance, request)[Symbol.asyncIterator]();
      const first = lines.next();
      const settled = first.then(() => {});
      await (request.follow ? Promise.race([settled, delay(FIRST_LINE_WITHIN)]) : settled);
      const close = () => {
        left.abort();
        return lines.return?.();
      };
      try {
        return api.stream(call, async (stream) => {
          stream.signal.addEventListener("abort", () => left.abort(), { once: true });
          try {
            for (let next = await first; !next.done && !stream.signal.aborted; next = await lines.next()) {
              await stream.send({ data: JSON.stringify(next.value) });
            }
          } finally {
            await close();
          }
        });
      } catch (error) {
        void close();
        throw error;
      }
    },
  });

  api.route({
    method: "GET",
    path: "/instances/:id/stats",
    scope: "instance:read",
    summary: "What an instance uses now",
    responses: { 200: { description: "Its use", schema: schemas.StatsAnswer } },
    async handle(call) {
      const instance = named(call);
      const stats = await hypervisor.driverOf(instance, "stats").stats(instance);
      const allocated = instance.memory_bytes ?? 0;
      const body = {
        instance_id: instance.id,
        instance_name: instance.name,
        ...stats,
        allocated_vcpus: instance.vcpus ?? 0,
        allocated_memory_bytes: allocated,
        memory_utilization_ratio: allocated > 0 ? stats.memory_rss_bytes / allocated : null,
      };
      return { status: 200, body };
    },
  });

  api.route({
    method: "GET",
    path: "/instances/:id/stat",
    scope: "instance:read",
    summary: "What a path in an instance's file system is",
    query: schemas.StatQuery,
    responses: { 200: { description: "The path", schema: schemas.StatAnswer } },
    async handle(call) {
      const instance = named(call);
      const { path, follow_links } = call.query as v.InferOutput<typeof schemas.StatQuery>;
      const body = await hypervisor.driverOf(instance, "stat").stat(instance, path, follow_links === "true");
      return { status: 200, body };
    },
  });

  api.route({
    method: "POST",
    path: "/instances/:id/exec",
    scope: "instance:write",
    summary: "Run a command in an instance; its output is kept up to 1 MiB for stdout and stderr each",
    body: schemas.ExecBody,
    codes: { timeout: "invalid_timeout" },
    responses: { 200: { description: "How it ended", schema: schemas.ExecAnswer } },
    // Its own timeout bounds it, and it ends when the client leaves.
    long: true,
    async handle(call) {
      const instance = named(call);
      const driver = hypervisor.driverOf(instance, "exec");
      const { timeout, ...request } = call.body as v.InferOutput<typeof schemas.ExecBody>;
      const timeout_ms = timeout === undefined ? DEFAULT_TIMEOUT : parseDuration(timeout)!;
      const wanted = { ...request, timeout_ms, max_output: MAX_OUTPUT, signal: call.signal };
      const body = await execs.run(instance, () => driver.exec(instance, wanted));
      return { status: 200, body };
    },
  });
}
