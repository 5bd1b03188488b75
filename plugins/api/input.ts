import type { Context, MiddlewareHandler } from "hono";
import { validator } from "hono-openapi";
import * as v from "valibot";
import { type ApiRoute, DormouseError, type ErrorCode } from "../../main.ts";
import { didYouMean } from "../shared/nearest.ts";

const JSON_TYPE = /^application\/([\w.-]+\+)?json\s*(;|$)/i;
const NESTED = /^([^[\]]+)\[([^[\]]*)\]$/;
const NOTHING = v.object({});

type Codes = ApiRoute["codes"];

/**
 * Reads the body of a request whose route takes one, before its schema is applied. An empty one counts as `{}` where the
 * route can do without.
 *
 * @throws {DormouseError} `unsupported_media_type`, `malformed_json`, `invalid_request` where it is missing or no object
 */
export function bodyReader(optional: boolean): MiddlewareHandler {
  return async function readBody(c, next) {
    const text = await c.req.text();
    const type = c.req.header("Content-Type");
    if (text !== "" && !JSON_TYPE.test(type ?? "")) {
      const found = type === undefined ? "none" : `"${type.slice(0, 100)}"`;
      throw new DormouseError("unsupported_media_type", `Expected Content-Type "application/json": found ${found}`);
    }
    if (text === "" && !optional) throw new DormouseError("invalid_request", "Missing body: expected a JSON object");
    // Hono parses the text it has cached, which its types take for the text itself.
    if (text === "") c.req.bodyCache.text = Promise.resolve("{}") as unknown as string;
    else parse(text);
    await next();
  };
}

function parse(text: string): void {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (error) {
    const reason = error instanceof Error ? error.message.slice(0, 200) : "";
    throw new DormouseError("malformed_json", `Cannot parse the body as JSON: ${reason}`, { cause: error });
  }
  if (isTable(value)) return;
  const found = value === null ? "null" : Array.isArray(value) ? "an array" : `a ${typeof value}`;
  throw new DormouseError("invalid_request", `Wrong body: expected a JSON object, found ${found}`);
}

/** Checks the body against a schema, or leaves that to the handler, and puts the schema into the OpenAPI document. */
export function bodyValidator(
  schema: v.GenericSchema,
  { codes, checked }: { codes?: Codes; checked?: boolean },
): MiddlewareHandler {
  return validator("json", checked ? unchecked(schema) : strict(schema), refuse(codes));
}

/** Checks the query against a schema: keys that it lacks are refused, `tags[a]=b` is read as `{ tags: { a: "b" } }`. */
export function queryValidator(schema: v.GenericSchema | undefined, codes?: Codes): MiddlewareHandler {
  const nested = strict(schema ?? NOTHING);
  const { validate } = nested["~standard"];
  return validator(
    "query",
    replaced(nested, (query) => validate(nest(query as Record<string, unknown>))),
    refuse(codes),
  );
}

/** What the schemas made of the request. */
export function validated(c: Context): { query: Record<string, unknown>; body: unknown } {
  const { req } = c as Context<
    Record<string, never>,
    string,
    { out: { query: Record<string, unknown>; json: unknown } }
  >;
  return { query: req.valid("query") ?? {}, body: req.valid("json") };
}

type Validate = v.GenericSchema["~standard"]["validate"];

// Still Valibot's own structure, from which the document is made, with another way to validate.
function replaced(schema: v.GenericSchema, validate: Validate): v.GenericSchema {
  return { ...schema, "~standard": { ...schema["~standard"], validate } };
}

function unchecked(schema: v.GenericSchema): v.GenericSchema {
  return replaced(schema, (value) => ({ value }));
}

function strict(schema: v.GenericSchema): v.GenericSchema {
  const { entries } = schema as unknown as { entries?: Record<string, unknown> };
  return replaced(schema, (value) => {
    const unknown = isTable(value) && entries && Object.keys(value).find((key) => !Object.hasOwn(entries, key));
    if (unknown === undefined || unknown === false) return schema["~standard"].validate(value);
    return {
      issues: [{
        message: `Unknown field "${shorten(unknown)}"${didYouMean(unknown, Object.keys(entries!))}`,
        path: [unknown],
      }],
    };
  });
}

// Valibot leaves these out of a record without a word; a filter by one would be no filter.
const LEFT_OUT = ["__proto__", "prototype", "constructor"];

function nest(query: Record<string, unknown>): Record<string, unknown> {
  const nested = new Map<string, unknown>();
  for (const [key, value] of Object.entries(query)) {
    const [, outer, inner] = NESTED.exec(key) ?? [];
    if (outer !== undefined && LEFT_OUT.includes(inner)) {
      throw new DormouseError("invalid_request", `Unknown field "${shorten(key)}"`, {
        details: { field: shorten(key) },
      });
    }
    const before = nested.get(outer);
    if (outer === undefined) nested.set(key, value);
    else nested.set(outer, { ...(isTable(before) && before), [inner]: value });
  }
  return Object.fromEntries(nested);
}

interface Issue {
  message: string;
  path?: readonly unknown[];
}

function refuse(codes: Codes = {}) {
  return (result: { success: boolean; error?: readonly Issue[] }): undefined => {
    if (result.success || !result.error) return;
    const issue = result.error[0];
    const path = (issue.path ?? []).map((part) => String(isTable(part) ? part.key : part));
    const code: ErrorCode = (Object.hasOwn(codes, path[0] ?? "") && codes[path[0]]) || "invalid_request";
    const details = path.length > 0 ? { field: shorten(path.join(".")) } : undefined;
    throw new DormouseError(code, explain(issue, shorten(path.join("."))), { ...(details && { details }) });
  };
}

function explain(
  issue: Issue & { kind?: string; input?: unknown; expected?: string; received?: string },
  path: string,
) {
  if (issue.kind === undefined) return issue.message;
  if (path === "") return `Wrong request: expected ${issue.expected}, found ${issue.received}`;
  if (issue.input === undefined) return `Missing field "${path}": expected ${issue.expected}`;
  const expected = issue.kind === "schema" && issue.expected ? `expected ${issue.expected}` : issue.message;
  return `Wrong value of "${path}": ${expected}, found ${shorten(issue.received ?? "")}`;
}

function shorten(text: string): string {
  return text.length > 100 ? `${text.slice(0, 97)}...` : text;
}

function isTable(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}
