/**
 * The HTTP API. `options.ts` is what the config says, `server.ts` listens on either runtime; `app.ts` is what a request
 * goes through (`access.ts` tokens and scopes, `input.ts` bodies and queries, `errors.ts` answers that refuse), made of
 * the routes that plugins add (`routes.ts`); `routes/` are those of this plugin, with `idempotency.ts` for creations,
 * `sse.ts` for streams, and `openapi.ts` and `docs.ts` for the document and the page that shows it.
 */
import { type Api, definePlugin, DormouseError } from "../../main.ts";
import { messageOf } from "../shared/errors.ts";
import { parseListen } from "../shared/listen.ts";
import { createApp } from "./app.ts";
import { documentRoutes } from "./docs.ts";
import { Execs } from "./execs.ts";
import { Idempotency } from "./idempotency.ts";
import { ApiOptions } from "./options.ts";
import { RouteTable } from "./routes.ts";
import { actionRoutes } from "./routes/actions.ts";
import { liveEvents } from "./routes/events.ts";
import { hostRoutes } from "./routes/host.ts";
import { inspectionRoutes } from "./routes/inspection.ts";
import { instanceRoutes } from "./routes/instances.ts";
import { listen } from "./server.ts";
import { Streams } from "./sse.ts";

/** Milliseconds that requests under way may take to end when the host closes: longer than what they wait for has. */
const GRACE = 13_000;

export default definePlugin<ApiOptions>({
  name: "api",
  requires: ["store", "hypervisor", "network?"],
  provides: ["api"],
  options: ApiOptions,
  setup(host, options) {
    const hypervisor = host.use("hypervisor");
    const table = new RouteTable();
    const streams = new Streams(host.log);
    let url = "";
    const api: Api = {
      route: (route) => table.add(route),
      stream: (call, work) => streams.answer(call, work),
      get url() {
        return url;
      },
    };
    instanceRoutes(api, hypervisor, new Idempotency(host.use("store"), hypervisor, host.hooks));
    actionRoutes(api, hypervisor);
    inspectionRoutes(api, hypervisor, new Execs(host.hooks));
    hostRoutes(api, host, hypervisor, host.find("network"));
    const setApp = documentRoutes(api, host.version);
    host.provide("api", api);

    // Last of all, when every plugin has added its routes and fields, and instances are known.
    host.hooks.guard("host:ready", async () => {
      if (!table.has("GET", "/events")) liveEvents(api, hypervisor, host.hooks);
      const address = parseListen(options.listen)!;
      const trusting = options.tokens.length === 0 && !("path" in address);
      const app = createApp(table.take(), {
        options,
        log: host.log,
        closing: host.signal,
        trusting,
        plugins: host.plugins,
        answered: (request) => host.hooks.publish("api:request", request),
      });
      setApp(app);
      const server = await listen(app.fetch, address).catch((error) => {
        const elsewhere =
          "plugins.api.listen in the config, or DORMOUSE_PLUGINS__API__LISTEN, may name another address";
        const message = `Cannot listen on "${options.listen}": ${messageOf(error)} (${elsewhere})`;
        throw new DormouseError("plugin_failed", message, { cause: error });
      });
      url = server.url;
      host.defer(() => server.close(GRACE));
      host.log.info("API on {url}", { url });
    }, { priority: -100 });
  },
});
