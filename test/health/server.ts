/** Answers every request with 200, for tests to run as an instance: `server.ts PORT`. */
import { createServer } from "node:http";
import process from "node:process";

createServer((_, response) => response.end("ready")).listen({ port: Number(process.argv[2]), host: "0.0.0.0" });
