import * as v from "valibot";
import { parseDuration } from "./duration.ts";

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
