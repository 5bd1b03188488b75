import { type IncomingMessage, request as insecure, type RequestOptions } from "node:http";
import { request as secure } from "node:https";
import type { Socket } from "node:net";
import { connect as overTls } from "node:tls";
import { VERSION } from "../../main.ts";
import { messageOf } from "../shared/errors.ts";
import type { HealthCheck } from "./policy.ts";

type HttpCheck = NonNullable<HealthCheck["http"]>;

/** Bytes of a body in which is looked for what is expected. */
const BODY = 64 * 1024;
const HEADERS = { "User-Agent": `Dormouse/${VERSION}`, Accept: "*/*" };

/**
 * One GET over a connection that is there. Redirects are answers like any other. `close` is called as soon as all is
 * known, for at the end of the answer the connection would be ended in order; the caller calls it in any case.
 *
 * @throws {Error} where the answer is not as expected, or there is none
 */
export async function get(socket: Socket, host: string, check: HttpCheck, close: () => void): Promise<void> {
  const { port, path, scheme, expected_status, expected_body, tls_verify } = check;
  const stream = scheme === "http" ? socket : overTls({ socket, host, rejectUnauthorized: tls_verify });
  // What breaks once there is an answer is not told to anybody, but unheard it would end the process.
  stream.on("error", () => {});
  try {
    const response = await answer(scheme === "https" ? secure : insecure, {
      host,
      port,
      path,
      headers: HEADERS,
      createConnection: () => stream,
    });
    if (response.statusCode !== expected_status) {
      throw new Error(`status is ${response.statusCode}, expected ${expected_status}`);
    }
    if (expected_body !== undefined && !await holds(response, expected_body, close)) {
      throw new Error("the expected body is not there");
    }
  } catch (error) {
    throw new Error(`GET ${scheme}://${host}:${port}${path}: ${messageOf(error).trim()}`, { cause: error });
  }
}

function answer(send: typeof insecure, options: RequestOptions): Promise<IncomingMessage> {
  return new Promise((resolve, reject) => {
    const request = send(options);
    const answered = (response: IncomingMessage) => resolve(response.on("error", () => {}));
    request.on("error", reject);
    request.once("response", answered);
    request.once("upgrade", answered); // 101, which is an answer too
    request.end();
  });
}

/** Whether the text is in what there is of the body, up to a bound. An answer that never ends is not read to its end. */
function holds(response: IncomingMessage, wanted: string, close: () => void): Promise<boolean> {
  const decoder = new TextDecoder();
  let [text, left] = ["", BODY];
  return new Promise((resolve, reject) => {
    const settle = (found: boolean) => {
      resolve(found);
      close();
    };
    response.on("data", (part: Uint8Array) => {
      // Only what could be the begin of it is looked at again, however small the parts are.
      text = text.slice(Math.max(0, text.length - wanted.length + 1)) +
        decoder.decode(part.subarray(0, left), { stream: true });
      left -= part.length;
      if (text.includes(wanted)) settle(true);
      else if (left <= 0) settle(false);
    });
    response.on("error", reject);
    response.once("end", () => settle(false));
  });
}
