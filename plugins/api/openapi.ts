import type { MiddlewareHandler } from "hono";
import { describeRoute, generateSpecs, resolver, type ResponsesWithResolver } from "hono-openapi";
import type * as v from "valibot";
import type { ApiRoute } from "../../main.ts";
import { PUBLIC } from "./access.ts";
import type { App } from "./app.ts";
import { ErrorBody } from "./errors.ts";

type Documented = v.GenericSchema | (() => v.GenericSchema);

const INSTANCE = "Of an instance: its id, its name, or the beginning of its id";

/** What a route says of itself, as middleware, which is how the generator finds it. */
export function described(route: ApiRoute): MiddlewareHandler {
  const { summary, scope, responses, bodyOptional } = route;
  const answers: ResponsesWithResolver = {};
  for (const [status, { description, schema, type = "application/json", also }] of Object.entries(responses)) {
    const schemas = Object.entries({ ...(schema && { [type]: schema }), ...also });
    const content = Object.fromEntries(schemas.map(([type, each]) => [type, { schema: resolver(made(each)) }]));
    answers[status] = { description, ...(schemas.length > 0 && { content }) };
  }
  answers.default = { description: "An error", content: { "application/json": { schema: resolver(ErrorBody) } } };
  return describeRoute({
    summary,
    tags: [route.path.split("/")[1]],
    responses: answers,
    ...(scope !== PUBLIC && { security: [{ bearer: [] }], description: `Scope \`${scope}\`` }),
    ...(bodyOptional && { requestBody: { required: false, content: {} } }),
  });
}

function made(schema: Documented): v.GenericSchema {
  return typeof schema === "function" ? schema() : schema;
}

/** The OpenAPI 3.1 document of the app's routes. */
export async function openApiOf(app: App, version: string): Promise<Record<string, unknown>> {
  const document = await generateSpecs(app, {
    excludeStaticFile: false,
    defaultValidationErrorResponse: false,
    documentation: {
      openapi: "3.1.0",
      info: {
        title: "Dormouse",
        version,
        description:
          "Runs instances, puts the idle ones to standby and wakes them. Durations are Go durations: `1m30s`.",
      },
      components: { securitySchemes: { bearer: { type: "http", scheme: "bearer" } } },
    },
  });
  for (const [path, item] of Object.entries(document.paths)) {
    for (const operation of Object.values(item) as { parameters?: QueryParameter[] }[]) {
      for (const parameter of operation.parameters ?? []) {
        readable(parameter);
        if (path.startsWith("/instances/{id}") && parameter.name === "id") parameter.description = INSTANCE;
      }
    }
  }
  return document as unknown as Record<string, unknown>;
}

interface QueryParameter {
  name?: string;
  in?: string;
  description?: string;
  schema?: { type?: string; enum?: unknown[]; pattern?: string };
  style?: string;
  explode?: boolean;
}

// A query is text on the wire, so its schemas are of strings. Clients that are generated want what the text stands for.
function readable(parameter: QueryParameter): void {
  const { schema } = parameter;
  if (parameter.in !== "query" || !schema) return;
  if (schema.type === "object") Object.assign(parameter, { style: "deepObject", explode: true });
  if (schema.enum?.join() === "true,false") parameter.schema = { type: "boolean" };
  if (schema.pattern === "^\\d+$") parameter.schema = { type: "integer" };
}
