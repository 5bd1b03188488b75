/** Greets who connects with the address it sees, for tests to run inside a namespace: `greeter.ts PORT`. */
import { createServer } from "node:net";
import process from "node:process";

createServer((socket) => {
  socket.on("error", () => socket.destroy());
  socket.end(`hello ${socket.remoteAddress}`);
}).listen(Number(process.argv[2]), "0.0.0.0", () => console.log("ready"));
