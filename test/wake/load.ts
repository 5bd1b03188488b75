/**
 * A server and the load for it, to be run inside namespaces: `load.ts serve PORT`, and `load.ts stream|connects HOST
 * PORT SECONDS`, which prints bytes or connections per second. A client says what it wants by its first byte.
 */
import { connect, createServer, type Socket } from "node:net";
import process from "node:process";

const STREAMS = 4;
const CONNECTING = 8;
const BLOCK = new Uint8Array(262_144);

const [mode, ...args] = process.argv.slice(2);
if (mode === "serve") serve(Number(args[0]));
else console.log(await (mode === "stream" ? stream : connects)(args[0], Number(args[1]), Number(args[2])));

function serve(port: number): void {
  createServer((socket) => {
    socket.on("error", () => socket.destroy());
    const fill = () => {
      while (!socket.destroyed && socket.write(BLOCK));
    };
    socket.once("data", ([wish]: Uint8Array) => {
      if (wish !== 1) return void socket.write("x");
      socket.on("drain", fill);
      fill();
    });
  }).listen({ port, host: "0.0.0.0", backlog: 1024 }, () => console.log("ready"));
}

async function stream(host: string, port: number, seconds: number): Promise<number> {
  let bytes = 0;
  const sockets = Array.from({ length: STREAMS }, () => {
    const socket = connect({ host, port }, () => socket.write(Uint8Array.of(1)));
    return socket.on("data", (data: Uint8Array) => bytes += data.length).on("error", fail);
  });
  await new Promise((resolve) => setTimeout(resolve, 500)); // the windows grow
  const [from, before] = [performance.now(), bytes];
  await new Promise((resolve) => setTimeout(resolve, seconds * 1000));
  const rate = (bytes - before) / (performance.now() - from) * 1000;
  for (const socket of sockets) socket.destroy();
  return rate;
}

async function connects(host: string, port: number, seconds: number): Promise<number> {
  let done = 0;
  const from = performance.now();
  const end = from + seconds * 1000;
  const worker = async () => {
    for (; performance.now() < end; done++) await one(host, port);
  };
  await Promise.all(Array.from({ length: CONNECTING }, worker));
  return done / (performance.now() - from) * 1000;
}

function one(host: string, port: number): Promise<void> {
  return new Promise((resolve, reject) => {
    const socket: Socket = connect({ host, port }, () => socket.write(Uint8Array.of(2)));
    socket.on("error", reject).once("data", () => {
      // No TIME_WAIT is left, in which ports would run out.
      socket.resetAndDestroy();
      resolve();
    });
  });
}

function fail(error: Error): void {
  throw error;
}
