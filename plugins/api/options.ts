import * as v from "valibot";
import { isLocal, parseListen } from "../shared/listen.ts";
import { duration } from "../shared/schemas.ts";

/** A token's scope: `*`, `instance:*` or `instance:read`. */
const TOKEN_SCOPE = /^(\*|[a-z][a-z-]*:(\*|read|write|delete))$/;

const Token = v.object({
  /** Shown in logs and as the actor of events, `api:NAME`. */
  name: v.pipe(v.string(), v.regex(/^[\w.-]{1,64}$/, "expected 1 to 64 of letters, digits, _ . and -")),
  token: v.pipe(
    v.string(),
    v.rawCheck(({ dataset, addIssue }) => {
      // Told without what was found, for config errors end up in logs.
      const wrong = (message: string) => addIssue({ message, input: "(hidden)" });
      if (!dataset.typed) return;
      if (!/^[\w.~+/-]+=*$/.test(dataset.value)) wrong("expected only characters of a bearer token (RFC 6750)");
      else if (dataset.value.length < 16) wrong("expected at least 16 characters");
    }),
  ),
  scopes: v.optional(
    v.array(v.pipe(v.string(), v.regex(TOKEN_SCOPE, 'expected "*", "instance:*" or "instance:read"'))),
    ["*"],
  ),
});
export type Token = v.InferOutput<typeof Token>;

const Fields = v.object({
  /**
   * `127.0.0.1:8080`, `[::1]:8080`, `localhost:8080` or `unix:/path`; port 0 takes a free one. Without tokens it must be
   * this machine's loopback or a socket file, and then no token is asked for; requests of web pages are refused there,
   * that is those with a foreign `Origin`, or with a `Host` that is not loopback (DNS rebinding).
   */
  listen: v.optional(
    v.pipe(
      v.string(),
      v.check((text) => parseListen(text) !== undefined, "expected an address such as 127.0.0.1:8080"),
    ),
    "127.0.0.1:8080",
  ),
  /** Time limit of a request that is neither a stream nor a long poll. */
  request_timeout: v.optional(duration({ min: 1 }), "60s"),
  /** With at least one, every route but the public ones needs a token, on loopback too. */
  tokens: v.optional(v.array(Token), []),
  /** One log line for each request. */
  access_log: v.optional(v.boolean(), true),
});

/** The options of the plugin. */
export const ApiOptions = v.pipe(
  Fields,
  v.rawCheck(({ dataset, addIssue }) => {
    if (!dataset.typed) return;
    const { listen, tokens } = dataset.value;
    const wrong = (key: "listen" | "tokens", input: unknown, message: string) =>
      addIssue({
        message,
        input,
        path: [{ type: "object", origin: "value", input: dataset.value, key, value: input }],
      });
    const address = parseListen(listen);
    if (tokens.length === 0 && address !== undefined && !isLocal(address)) {
      wrong("listen", listen, "an address that is not loopback needs [[plugins.api.tokens]]");
    }
    const names = tokens.map(({ name }) => name);
    if (new Set(names).size < names.length) wrong("tokens", names, "expected each name once");
  }),
);
export type ApiOptions = v.InferOutput<typeof ApiOptions>;
