/** Sends back what it gets, for tests to run as an instance: `sleep-echo.ts PORT`. It listens on IPv6 and IPv4. */
import { createServer } from "node:net";
import process from "node:process";

createServer({ allowHalfOpen: true }, (socket) => {
  socket.on("error", () => socket.destroy());
  socket.pipe(socket);
}).listen({ port: Number(process.argv[2]), host: "::", backlog: 512 });
