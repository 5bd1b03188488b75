import type { TestContext } from "node:test";
import {
  type Api,
  type ApiRoute,
  definePlugin,
  DormouseError,
  type ExecRequest,
  type Feature,
  type Hypervisor,
  type Instance,
  type LogRequest,
  type Plugin,
  type RunningHost,
} from "../../main.ts";
import apiPlugin from "../../plugins/api/mod.ts";
import hypervisorPlugin from "../../plugins/hypervisor/mod.ts";
import storePlugin from "../../plugins/store.ts";
import { cleanup, startWith } from "../helpers.ts";
import { ScriptedDriver } from "../hypervisor/scripted.ts";

/** The scripted driver with all that can be looked at: logs, stats, stat and exec answer what a test puts in. */
export class TalkingDriver extends ScriptedDriver {
  lines: (instance: Instance, request: LogRequest) => AsyncIterable<string> = async function* () {};
  execs: ExecRequest[] = [];
  /** Ends the command "forever" that was begun last. */
  end = () => {};

  constructor() {
    super();
    for (const feature of ["logs", "stats", "stat", "exec"] as const) (this.features as Set<Feature>).add(feature);
  }

  logs = (instance: Instance, request: LogRequest) => this.lines(instance, request);
  stats = async () => ({
    cpu_seconds: 1.5,
    memory_rss_bytes: 1024,
    memory_vms_bytes: 4096,
    network_rx_bytes: 10,
    network_tx_bytes: 20,
  });
  stat = async (_instance: Instance, path: string, follow: boolean) => {
    const link_target = follow ? null : path;
    return { exists: true, is_dir: false, is_file: follow, is_symlink: !follow, link_target, mode: 0o644, size: 3 };
  };
  exec = async (_instance: Instance, request: ExecRequest) => {
    this.execs.push(request);
    if (request.command[0] === "forever") {
      const { promise, resolve } = Promise.withResolvers<void>();
      this.end = resolve;
      request.signal?.addEventListener("abort", () => resolve(), { once: true });
      await promise;
    }
    return { exit_code: 0, stdout: request.command.join(" "), stderr: "", timed_out: false, truncated: false };
  };
}

export interface ApiFixture {
  host: RunningHost;
  api: Api;
  hypervisor: Hypervisor;
  driver: TalkingDriver;
  url: string;
  /** A request with a JSON body, and its answer with the body parsed. */
  call(method: string, path: string, body?: unknown, headers?: Record<string, string>): Promise<Reply>;
}
export interface Reply {
  status: number;
  headers: Headers;
  body: Body;
}
/** What answers have that tests look at; `{}` where the answer is empty. */
export interface Body {
  [key: string]: unknown;
  code: string;
  message: string;
  details: Record<string, unknown>;
  id: string;
  name: string;
  state: string;
}

export interface ApiFixtureOptions {
  folder?: string;
  /** The `[plugins.api]` table. */
  table?: Record<string, unknown>;
  driver?: TalkingDriver;
  routes?: ApiRoute[];
  plugins?: Plugin[];
  /** The tables of these, by name. */
  tables?: Record<string, Record<string, unknown>>;
  host?: Record<string, unknown>;
}

/** A host with the real store, registry and API on a free port of loopback, and the talking driver. */
export async function apiHost(t: TestContext, options: ApiFixtureOptions = {}): Promise<ApiFixture> {
  const { driver = new TalkingDriver(), table = {}, routes = [], plugins = [] } = options;
  const talking = definePlugin({
    name: "talking",
    requires: ["hypervisor", "api"],
    setup(host) {
      const registered = host.use("hypervisor").register(driver);
      host.defer(() => registered[Symbol.dispose]());
      for (const route of routes) host.use("api").route(route);
    },
  });
  const tables = {
    ...options.tables,
    hypervisor: { default_driver: "scripted" },
    api: { listen: "127.0.0.1:0", access_log: false, ...table },
  };
  const all = [storePlugin, hypervisorPlugin, talking, apiPlugin, ...plugins] as Plugin[];
  const { folder, host: hostTable } = options;
  const host = await startWith(t, all, { tables, ...(folder && { folder }), ...(hostTable && { host: hostTable }) });
  const api = host.use("api");
  const call: ApiFixture["call"] = async (method, path, body, headers = {}) => {
    const type: Record<string, string> = body === undefined ? {} : { "Content-Type": "application/json" };
    const text = typeof body === "string" ? body : JSON.stringify(body);
    const init = { method, headers: { ...type, ...headers }, ...(body !== undefined && { body: text }) };
    const response = await fetch(api.url + path, init);
    const answer = await response.text();
    const json = response.headers.get("Content-Type")?.startsWith("application/json") && answer !== "";
    return { status: response.status, headers: response.headers, body: json ? JSON.parse(answer) : { text: answer } };
  };
  return { host, api, hypervisor: host.use("hypervisor"), driver, url: api.url, call };
}

/** One message of a stream; a comment is under `comment`. */
export interface Message {
  event?: string;
  id?: string;
  data?: string;
  comment?: string;
}

/** Opens a stream of Server-Sent Events; `next` gives one message after the other, undefined at the end. */
export async function openStream(t: TestContext, url: string, headers: Record<string, string> = {}) {
  const leave = new AbortController();
  cleanup(t).defer(() => leave.abort());
  const response = await fetch(url, { headers, signal: leave.signal });
  const reader = response.body!.pipeThrough(new TextDecoderStream() as ReadableWritablePair<string, Uint8Array>)
    .getReader();
  let text = "";
  const next = async (): Promise<Message | undefined> => {
    for (let end = text.indexOf("\n\n"); end < 0; end = text.indexOf("\n\n")) {
      const { done, value } = await reader.read();
      if (done) return undefined;
      text += value;
    }
    const [block] = text.split("\n\n", 1);
    text = text.slice(block.length + 2);
    const message: Record<string, string> = {};
    for (const line of block.split("\n")) {
      const [, key, value] = /^([^:]*): ?(.*)$/s.exec(line)!;
      message[key === "" ? "comment" : key] = value;
    }
    return message;
  };
  /** The next that is no comment. */
  const event = async (): Promise<Message | undefined> => {
    for (;;) {
      const message = await next();
      if (message?.comment === undefined) return message;
    }
  };
  return { response, next, event, leave: () => leave.abort() };
}

/** What a log line of a driver with no log is. */
export function noLog(): DormouseError {
  return new DormouseError("log_not_found", 'Cannot read log "vmm": there is none');
}
