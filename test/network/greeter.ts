/** Greets who connects with the address it sees, for tests to run inside a namespace: `greeter.ts PORT [ADDRESS]`. */
import { createServer } from "node:net";
import process from "node:process";

const [port, address = "0.0.0.0"] = process.argv.slice(2);
createServer((socket) => {
  socket.on("error", () => socket.destroy());
  socket.end(`hello ${socket.remoteAddress}`);
}).listen(Number(port), address, () => console.log("ready"));
