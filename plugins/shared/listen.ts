import ipaddr from "ipaddr.js";

/** Where to listen: an address and a port, or a socket file. */
export type Listen = { hostname: string; port: number } | { path: string };

/** A `listen` option taken apart, `127.0.0.1:8080`, `[::1]:8080` or `unix:/path`; undefined for what is none. */
export function parseListen(text: string): Listen | undefined {
  if (text.startsWith("unix:/")) return { path: text.slice("unix:".length) };
  const [, bracketed, plain, digits] = /^(?:\[([^\]]+)\]|([^:]+)):(\d{1,5})$/.exec(text) ?? [];
  const hostname = bracketed ?? plain;
  const port = Number(digits);
  if (hostname === undefined || port > 65535) return undefined;
  if (hostname === "localhost") return { hostname: "127.0.0.1", port };
  const fits = bracketed === undefined ? ipaddr.IPv4.isValidFourPartDecimal(hostname) : ipaddr.IPv6.isValid(hostname);
  return fits ? { hostname, port } : undefined;
}

/** Whether only this machine can reach it. */
export function isLocal(listen: Listen): boolean {
  return "path" in listen || ipaddr.process(listen.hostname).range() === "loopback";
}

/** Whether a `Host` header names this machine's loopback, as it does unless a page points its own domain there. */
export function isLoopbackName(host: string): boolean {
  const name = host.replace(/:\d*$/, "").replace(/^\[(.*)\]$/, "$1").toLowerCase();
  if (name === "localhost" || name.endsWith(".localhost")) return true;
  return ipaddr.isValid(name) && ipaddr.process(name).range() === "loopback";
}
