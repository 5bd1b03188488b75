import { createHash, timingSafeEqual } from "node:crypto";
import type { Context, MiddlewareHandler } from "hono";
import { bearerAuth } from "hono/bearer-auth";
import { DormouseError } from "../../main.ts";
import { isLoopbackName } from "../shared/listen.ts";
import { bodyOf } from "./errors.ts";
import type { Token } from "./options.ts";

/** The scope of a route that needs no token. */
export const PUBLIC = "public";

/** What a route's `scope` may be. */
export const SCOPE = /^(public|[a-z][a-z-]*:(read|write|delete))$/;

/** What is known of a caller: the name of its token, if tokens are asked for. */
export interface Caller {
  token?: string;
}
export type Env = { Variables: { requestId: string; caller: Caller; pattern: string } };

/**
 * Lets a request through whose token has the scope. All configured tokens are compared, by hashes of one length and in
 * constant time, so that the time taken tells neither a token's length nor which one came close.
 */
export function requireScope(scope: string, tokens: readonly Token[]): MiddlewareHandler<Env>[] {
  if (scope === PUBLIC || tokens.length === 0) return [];
  const hashed = tokens.map((token) => ({ ...token, hash: hash(token.token) }));
  const granted = new WeakMap<Context, Token>();
  const verifyToken = (given: string, c: Context) => {
    const candidate = hash(given);
    const [match] = hashed.filter((each) => timingSafeEqual(each.hash, candidate));
    if (match) granted.set(c, match);
    return match !== undefined;
  };
  const message = unauthorized;
  const refused = { message };
  return [
    bearerAuth({
      verifyToken,
      noAuthenticationHeader: refused,
      invalidAuthenticationHeader: refused,
      invalidToken: refused,
    }),
    async function checkScope(c, next) {
      const { name, scopes } = granted.get(c)!;
      c.set("caller", { token: name });
      if (!allows(scopes, scope)) {
        throw new DormouseError("forbidden", `Token "${name}" lacks the scope: ${scope}`, { details: { scope } });
      }
      await next();
    },
  ];
}

/** Whether one of a token's scopes covers what a route needs. */
export function allows(scopes: readonly string[], needed: string): boolean {
  return scopes.some((scope) => scope === "*" || scope === needed || scope === needed.replace(/:.*/, ":*"));
}

/**
 * Refuses what a web page in a browser on this machine sends, for a loopback address without tokens trusts everybody who
 * can reach it. A page of another site shows its `Origin`; one that points its own domain at 127.0.0.1 (DNS rebinding)
 * shows that domain as `Host`; and what a page embeds without either says so in `Sec-Fetch-Site`.
 *
 * @throws {DormouseError} `forbidden`
 */
export async function refuseWebPages(c: Context<Env>, next: () => Promise<void>): Promise<void> {
  const host = c.req.header("Host");
  const origin = c.req.header("Origin");
  if (host !== undefined && !isLoopbackName(host)) throw forbidden("Host", host);
  if (origin !== undefined && originHost(origin) !== host) throw forbidden("Origin", origin);
  if (c.req.header("Sec-Fetch-Site") === "cross-site" && c.req.header("Sec-Fetch-Mode") !== "navigate") {
    throw forbidden("Sec-Fetch-Site", "cross-site");
  }
  await next();
}

function forbidden(header: string, value: string): DormouseError {
  const message = `Cannot serve web pages of other sites without a token: ${header} is "${value.slice(0, 100)}"`;
  return new DormouseError("forbidden", message);
}

function originHost(origin: string): string | undefined {
  return URL.canParse(origin) ? new URL(origin).host : undefined;
}

// bearerAuth has a status of its own for each case; a client needs only one.
function unauthorized(c: Context): Response {
  const given = c.req.header("Authorization") !== undefined;
  const message = given ? "The bearer token is wrong" : "Missing bearer token: send Authorization: Bearer TOKEN";
  return c.json(bodyOf(new DormouseError("unauthorized", message)), 401);
}

function hash(token: string): Uint8Array {
  return createHash("sha256").update(token).digest();
}
