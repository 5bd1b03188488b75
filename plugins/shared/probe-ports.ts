import { once } from "node:events";
import { connect, type Socket } from "node:net";
import type { Flow } from "./contracts.ts";

/**
 * The source ports of connections that Dormouse itself opens to find out whether an instance answers. They lie above
 * `net.ipv4.ip_local_port_range`, so the kernel gives them to nobody else: a flow from the host with one of them is no
 * activity and wakes nothing.
 */
export const PROBE_PORTS = { first: 64_000, last: 64_511 } as const;

const COUNT = PROBE_PORTS.last - PROBE_PORTS.first + 1;
/** Another process of this machine may probe too: both do not begin with the same port. */
let turn = Math.floor(Math.random() * COUNT);

/** Whether a flow is a probe of ours: from one of the host's own addresses on the bridge, with a port of the range. */
export function isProbe(
  { source, source_port }: Pick<Flow, "source" | "source_port">,
  ...gateways: (string | null | undefined)[]
): boolean {
  return source_port >= PROBE_PORTS.first && source_port <= PROBE_PORTS.last && gateways.includes(source);
}

/**
 * Connects from a port of the range. The caller destroys the socket.
 *
 * @throws {Error} the socket's own, `ECONNREFUSED` and the like; `ETIMEDOUT` after `timeout` milliseconds; the signal's reason
 */
export async function dialProbe(
  host: string,
  port: number,
  { signal, timeout = 2_000 }: { signal?: AbortSignal; timeout?: number } = {},
): Promise<Socket> {
  for (let left = COUNT;;) {
    signal?.throwIfAborted();
    const socket = connect({ host, port, localPort: PROBE_PORTS.first + turn++ % COUNT });
    const late = () => socket.destroy(Object.assign(new Error(`${host}:${port} is silent`), { code: "ETIMEDOUT" }));
    const timer = setTimeout(late, timeout);
    const abort = () => socket.destroy(signal!.reason);
    signal?.addEventListener("abort", abort);
    try {
      await once(socket, "connect");
      // What happens to it later is for the caller to see; an `error` that nobody listens to would end the process.
      return socket.on("error", () => {});
    } catch (error) {
      socket.destroy();
      // Held by somebody, or by a connection of before to the same place that rests in TIME_WAIT: the next one, then.
      const taken = ["EADDRINUSE", "EADDRNOTAVAIL"].includes((error as NodeJS.ErrnoException).code ?? "");
      if (!taken || --left <= 0) throw error;
    } finally {
      clearTimeout(timer);
      signal?.removeEventListener("abort", abort);
    }
  }
}
