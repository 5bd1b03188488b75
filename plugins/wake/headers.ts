import type { IncomingMessage } from "node:http";

/** Of one connection only, RFC 9110 section 7.6.1; those that `Connection` names are as well. */
const HOP_BY_HOP = [
  "connection",
  "keep-alive",
  "proxy-authenticate",
  "proxy-authorization",
  "proxy-connection",
  "te",
  "trailer",
  "transfer-encoding",
  "upgrade",
];
/** What `Connection` must not take away: without them the message would be another. */
const KEPT = ["host", "content-length", "content-type"];

type Pairs = [name: string, value: string][];

/** The headers of a message that go on, as names and values in turn. */
function endToEnd({ rawHeaders, headers }: IncomingMessage): Pairs {
  const named = (headers.connection ?? "").toLowerCase().split(",").map((name) => name.trim());
  const dropped = new Set([...HOP_BY_HOP, ...named.filter((name) => !KEPT.includes(name))]);
  const pairs: Pairs = [];
  for (let i = 0; i < rawHeaders.length; i += 2) {
    if (!dropped.has(rawHeaders[i].toLowerCase())) pairs.push([rawHeaders[i], rawHeaders[i + 1]]);
  }
  return pairs;
}

/**
 * What the instance gets: the client's headers with the client's address at the end of `X-Forwarded-For`, and with the
 * host and scheme that were asked for, unless somebody before us said so. `upgrade` keeps the wish for another protocol.
 */
export function requestHeaders(request: IncomingMessage, { upgrade = false } = {}): string[] {
  const { headers, socket } = request;
  const address = (socket.remoteAddress ?? "").replace(/^::ffff:(?=\d+\.)/, "");
  const chain = [headers["x-forwarded-for"], address].flat().filter(Boolean).join(", ");
  const own = ["x-forwarded-for", "expect", ...(headers["x-forwarded-host"] ? [] : ["x-forwarded-host"])];
  const pairs = endToEnd(request).filter(([name]) => !own.includes(name.toLowerCase()));
  pairs.push(["X-Forwarded-For", chain]);
  if (!headers["x-forwarded-host"]) pairs.push(["X-Forwarded-Host", headers.host ?? ""]);
  if (!headers["x-forwarded-proto"]) pairs.push(["X-Forwarded-Proto", "http"]);
  if (headers["transfer-encoding"]) pairs.push(["Transfer-Encoding", "chunked"]);
  // No connection is kept for later: one that nobody uses would keep the instance awake.
  if (upgrade) pairs.push(["Connection", "Upgrade"], ["Upgrade", headers.upgrade ?? ""]);
  else pairs.push(["Connection", "close"]);
  return pairs.flat();
}

/** What the client gets back. */
export function responseHeaders(response: IncomingMessage): string[] {
  return endToEnd(response).flat();
}

/** The name in a `Host` header: lower case, without port and final dot. Empty where there is none. */
export function hostOf({ headers }: IncomingMessage): string {
  return (headers.host ?? "").toLowerCase().replace(/:\d*$/, "").replace(/\.$/, "");
}
