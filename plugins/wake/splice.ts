import { STATUS_CODES } from "node:http";
import { connect, type Socket } from "node:net";
import { setImmediate } from "node:timers";

/** Milliseconds of silence after which the kernel asks whether the other side is still there. */
const KEEP_ALIVE_MS = 60_000;
/** Milliseconds to wait for the first bytes of a connection that is to be refused. */
const FIRST_BYTES_MS = 100;
const REQUEST = /^[A-Z]{3,16} \S{1,4096} HTTP\/1\.[01]\r?\n/;

/** Connects from an ordinary port, so that it counts as activity. @throws {Error} the socket's, or the signal's reason */
export function dial(host: string, port: number, signal: AbortSignal): Promise<Socket> {
  return new Promise((resolve, reject) => {
    signal.throwIfAborted();
    const socket = connect({ host, port, allowHalfOpen: true, noDelay: true });
    const abort = () => socket.destroy(signal.reason);
    const settle = () => {
      signal.removeEventListener("abort", abort);
      socket.off("error", failed);
    };
    const failed = (error: Error) => (settle(), reject(error));
    signal.addEventListener("abort", abort);
    socket.on("error", failed);
    socket.once("connect", () => {
      settle();
      socket.on("error", () => {}); // `close` follows, and tells whoever has it
      resolve(socket);
    });
  });
}

/**
 * Joins two sockets until both have ended: each waits while the other is slow, one that ends its side leaves the other
 * direction open, and one that breaks breaks the other. Both have a listener for their `error` already.
 */
export function splice(a: Socket, b: Socket): void {
  for (const [from, to] of [[a, b], [b, a]] as const) {
    from.setKeepAlive(true, KEEP_ALIVE_MS);
    from.pipe(to);
    from.once("close", () => {
      const whole = from.readableEnded && from.writableFinished;
      if (!whole && !to.destroyed) to.resetAndDestroy();
    });
  }
}

/** Ends a connection; one that speaks HTTP is told when to come again. Nothing is said of why. */
export function refuse(socket: Socket, status: number): void {
  let answered = false;
  // What has come while this process had other things to do is read before it is decided that there is nothing.
  const timer = setTimeout(() => setImmediate(() => answered || answer()), FIRST_BYTES_MS);
  const answer = () => {
    answered = true;
    clearTimeout(timer);
    socket.off("readable", answer);
    const first: Uint8Array | null = socket.read();
    if (socket.destroyed) return;
    if (first === null || !REQUEST.test(new TextDecoder("latin1").decode(first))) return void socket.destroy();
    const head = `HTTP/1.1 ${status} ${
      STATUS_CODES[status]
    }\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n`;
    // Read on to its end, for closing with bytes unread would reset the answer away; but not for long.
    socket.resume().end(head);
    const rest = setTimeout(() => socket.destroy(), 1_000);
    socket.once("close", () => clearTimeout(rest));
    socket.once("end", () => socket.destroySoon());
  };
  socket.once("close", () => clearTimeout(timer));
  if (socket.readableLength > 0) answer();
  else socket.once("readable", answer);
}
