import * as v from "valibot";
import { parseDuration } from "./duration.ts";
import { parseSize } from "./size.ts";

/** Text that programs can be given: they know no NUL, and UTF-8 no half of a character. */
export function text() {
  return v.pipe(
    v.string(),
    v.check((text) => !text.includes("\0") && text.isWellFormed(), "expected text without NUL and lone surrogates"),
  );
}

/** A schema that says in the OpenAPI document what it is for. */
export function about<S extends v.GenericSchema>(text: string, schema: S) {
  return v.pipe(schema, v.description(text));
}

/** A Go duration such as `30s`, as milliseconds; at least `min`, 0 when absent. */
export function duration({ min = 0 } = {}) {
  return v.pipe(
    v.string('expected a duration such as "30s"'),
    v.check(
      (text) => (parseDuration(text) ?? -1) >= min,
      `expected a duration such as "30s"${min > 0 ? " above zero" : ""}`,
    ),
    v.transform((text) => parseDuration(text)!),
  );
}

/** A size such as `8MB`, as bytes; at least `min`, 0 when absent. */
export function size({ min = 0 } = {}) {
  return v.pipe(
    v.string('expected a size such as "8MB"'),
    v.check(
      (text) => (parseSize(text) ?? -1) >= min,
      `expected a size such as "8MB"${min > 0 ? ` of at least ${min} bytes` : ""}`,
    ),
    v.transform((text) => parseSize(text)!),
  );
}
