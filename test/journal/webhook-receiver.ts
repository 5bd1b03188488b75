// The receiver of README.md: prints what is signed with SECRET and not older than five minutes, and refuses the rest.
import { createHmac, timingSafeEqual } from "node:crypto";
import { createServer } from "node:http";
import process from "node:process";

const hmac = (text: string) => createHmac("sha256", process.env.SECRET!).update(text).digest("hex");
createServer(async (request, response) => {
  const body = (await request.setEncoding("utf8").toArray()).join("");
  const [, t, v1 = ""] = /^t=(\d+),v1=(\w{64})$/.exec(String(request.headers["dormouse-signature"])) ?? [];
  const signed = v1 !== "" && timingSafeEqual(Buffer.from(v1), Buffer.from(hmac(`${t}.${body}`)));
  const ok = signed && Math.abs(Date.now() / 1000 - Number(t)) < 300;
  if (ok) console.log(body);
  response.writeHead(ok ? 204 : 401).end();
}).listen(Number(process.env.PORT ?? 9000), "127.0.0.1");
