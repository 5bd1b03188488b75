import { HTTPException } from "hono/http-exception";
import * as v from "valibot";
import { DormouseError } from "../../main.ts";
import { ERRORS, messageOf } from "../shared/errors.ts";

/** What every answer with a status of 400 and above holds. */
export const ErrorBody = v.pipe(
  v.object({
    code: v.pipe(v.string(), v.description("For a machine; the README lists all codes")),
    message: v.pipe(v.string(), v.description("For a person")),
    details: v.optional(v.record(v.string(), v.unknown())),
  }),
  v.metadata({ ref: "Error" }),
);

/** A thrown value as the error that the client is told of; what is unexpected tells nothing of its cause. */
export function toDormouseError(error: unknown, requestId: string): DormouseError {
  if (error instanceof DormouseError) return error;
  if (error instanceof HTTPException && error.cause instanceof DormouseError) return error.cause;
  const message = `Cannot answer the request: internal error, see request "${requestId}" in the log`;
  return new DormouseError("internal_error", message, { cause: error });
}

/** The body of the answer that carries the error. */
export function bodyOf(error: DormouseError): v.InferOutput<typeof ErrorBody> {
  // A code of the start-up is nobody's business here, and its message may name files.
  if (ERRORS[error.code].status === null) return { code: "internal_error", message: "Cannot answer the request" };
  return { code: error.sent, message: error.message, ...(error.details && { details: error.details }) };
}

/** The messages of an error and of what caused it, outermost first, for a log line. */
export function chainOf(error: unknown): string {
  const parts: string[] = [];
  for (let each = error; each !== undefined && parts.length < 8; each = (each as { cause?: unknown } | null)?.cause) {
    parts.push(messageOf(each));
  }
  return parts.join(": ");
}
