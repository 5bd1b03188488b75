/** What the tests of waking share: a host with the plugin, and instances that are real servers in this process. */
import { once } from "node:events";
import { connect, createServer, type Server, type Socket } from "node:net";
import type { TestContext } from "node:test";
import type { Instance, Plugin, Wake } from "../../main.ts";
import wakePlugin from "../../plugins/wake/mod.ts";
import { cleanup, freePort } from "../helpers.ts";
import { type Fixture, ORIGIN, registryHost, ScriptedDriver } from "../hypervisor/scripted.ts";

type Serve = (socket: Socket) => void;

/** Sends back what it gets, and ends when it is ended. */
export const echo: Serve = (socket) => void socket.pipe(socket);

/** Runs a server on the port in `env.PORT` while the instance is awake; as with a VM, nothing is left while it sleeps. */
export class Machines extends ScriptedDriver {
  serve: Serve = echo;
  /** Runs before the server listens. */
  boot: (instance: Instance) => void | Promise<void> = () => {};
  readonly #servers = new Map<string, { server: Server; sockets: Set<Socket> }>();

  constructor() {
    super();
    const up = async (instance: Instance) => {
      await this.boot(instance);
      await this.open(instance);
    };
    const down = ({ id }: Instance) => this.close(id);
    Object.assign(this.script, { start: up, restore: up, standby: down, stop: down, delete: down });
  }

  async open({ id, env }: Instance): Promise<void> {
    const sockets = new Set<Socket>();
    const server = createServer({ allowHalfOpen: true }, (socket) => {
      sockets.add(socket);
      socket.on("error", () => socket.destroy());
      socket.once("close", () => sockets.delete(socket));
      this.serve(socket);
    });
    server.listen(Number(env.PORT), "127.0.0.1");
    await once(server, "listening");
    this.#servers.set(id, { server, sockets });
  }

  async close(id: string): Promise<void> {
    const running = this.#servers.get(id);
    this.#servers.delete(id);
    if (!running) return;
    const closed = once(running.server, "close");
    running.server.close();
    for (const socket of running.sockets) socket.destroy();
    await closed;
  }

  async closeAll(): Promise<void> {
    await Promise.all([...this.#servers.keys()].map((id) => this.close(id)));
  }
}

export interface World extends Omit<Fixture, "driver"> {
  driver: Machines;
  wake: Wake;
  /** A running instance that serves on `guest`, published on `port`. */
  make(name: string, wake?: Record<string, unknown>): Promise<Made>;
}
export interface Made {
  readonly id: string;
  readonly port: number;
  readonly guest: number;
}

/** A host with the plugin on; the machine's own network is the instances'. */
export async function wakeWorld(
  t: TestContext,
  options: { table?: Record<string, unknown>; folder?: string; driver?: Machines; plugins?: Plugin[] } = {},
): Promise<World> {
  const { table = {}, driver = new Machines(), plugins = [] } = options;
  cleanup(t).defer(() => driver.closeAll());
  const fixture = await registryHost(t, {
    driver,
    plugins: [wakePlugin as Plugin, ...plugins],
    tables: { wake: { bind: ["127.0.0.1"], ...table } },
    ...(options.folder && { folder: options.folder }),
  });
  const make = async (name: string, wake: Record<string, unknown> = {}) => {
    const [port, guest] = [await freePort(), await freePort()];
    const policy = { ports: [{ host_port: port, guest_port: guest }], ...wake };
    const body = { name, image: "x", env: { PORT: String(guest) }, wake: policy };
    const { id } = await fixture.hypervisor.create(body, ORIGIN);
    return { id, port, guest };
  };
  return { ...fixture, driver, wake: fixture.host.use("wake"), make };
}

/** A connection that is there. */
export async function open(t: TestContext, port: number, host = "127.0.0.1"): Promise<Socket> {
  const socket = connect({ host, port, allowHalfOpen: true });
  cleanup(t).defer(() => void socket.destroy());
  await once(socket, "connect");
  return socket;
}

/** Everything up to the other side's end. @throws where the connection breaks */
export async function rest(socket: Socket): Promise<string> {
  let text = "";
  for await (const chunk of socket) text += chunk;
  return text;
}

/** Says something, ends, and returns the whole answer; the error's code where there is none. */
export async function talk(port: number, text: string, host = "127.0.0.1"): Promise<string> {
  const socket = connect({ host, port, allowHalfOpen: true });
  try {
    socket.end(text);
    return await rest(socket);
  } catch (error) {
    return (error as NodeJS.ErrnoException).code ?? String(error);
  } finally {
    socket.destroy();
  }
}
