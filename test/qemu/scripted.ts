/** The other side of a socket, for tests of what a QEMU or a guest of one's own does not do when asked. */
import { Buffer } from "node:buffer";
import { once } from "node:events";
import { createServer, type Socket } from "node:net";
import { join } from "node:path";
import type { TestContext } from "node:test";
import { cleanup, temporaryFolder } from "../helpers.ts";

export interface Question {
  execute: string;
  arguments: Record<string, unknown>;
  id?: number;
}

/** What a connection is greeted with, and what it answers; `count` is 1 for the first connection. */
export interface Script {
  greet?(socket: Socket, count: number): void;
  answer(socket: Socket, question: Question, count: number): void;
}

/** Listens until the end of the test; the path of its socket. */
export async function scripted(t: TestContext, { greet, answer }: Script, path?: string): Promise<string> {
  const sockets = new Set<Socket>();
  const server = createServer((socket) => {
    const count = sockets.add(socket).size;
    let text = "";
    socket.on("error", () => {}); // what is left of it is seen by the other side
    socket.on("data", (chunk: Buffer) => {
      // A client's sentinel is no part of what it asks.
      const lines = (text + chunk.toString("latin1").replaceAll("\xff", "")).split("\n");
      text = lines.pop()!;
      for (const line of lines) answer(socket, JSON.parse(line), count);
    });
    greet?.(socket, count);
  });
  const where = path ?? join(temporaryFolder(t), "socket");
  server.listen(where);
  await once(server, "listening");
  cleanup(t).defer(async () => {
    for (const socket of sockets) socket.destroy();
    await once(server.close(), "close");
  });
  return where;
}

/** Sends each as a line of JSON; text and bytes go as they are. */
export function say(socket: Socket, ...messages: (Record<string, unknown> | string | Buffer)[]): void {
  for (const message of messages) {
    const raw = typeof message === "string" || Buffer.isBuffer(message);
    socket.write(raw ? message : `${JSON.stringify(message)}\n`);
  }
}
