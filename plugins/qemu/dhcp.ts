import { chmodSync, existsSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import type { Logger } from "@logtape/logtape";
import type { Instance, Network } from "../../main.ts";
import { delay } from "../shared/async.ts";
import { messageOf } from "../shared/errors.ts";
import { ownerOf } from "../shared/hierarchy.ts";
import { bootId, isAlive, type ProcessId, signalProcess } from "../shared/proc.ts";
import { Dnsmasq } from "./dnsmasq.ts";
import { untilDead } from "./launch.ts";
import type { Owner } from "./records.ts";

/** Milliseconds until one that died is started again: the first time, and at most. */
const RETRY_MS = [500, 30_000];
/** What a line would say otherwise than as a name: how long, and that nobody is answered. */
const NO_NAME = /^(?:\d+[smhdw]?|infinite|ignore)$/;

export interface DhcpOptions {
  /** Where its files are. */
  readonly folder: string;
  readonly network: Network | undefined;
  readonly owner: Owner | null;
  readonly log: Logger;
}

/**
 * Tells machines their address that ask for it by DHCP. There is one `dnsmasq` for all of them, as soon as there is one of
 * them, and as long as this host.
 */
export class Dhcp implements AsyncDisposable {
  readonly #options: DhcpOptions;
  readonly #hosts: string;
  readonly #pid: string;
  readonly #lines = new Map<string, string>();
  readonly #closing = new AbortController();
  #server: Dnsmasq | undefined;
  #written = "";
  #turn: Promise<unknown> = Promise.resolve();
  #reviving: Promise<void> | undefined;

  constructor(options: DhcpOptions) {
    this.#options = options;
    this.#hosts = join(options.folder, "dhcp.hosts");
    this.#pid = join(options.folder, "dnsmasq.json");
  }

  /**
   * Resolves when the instance would be answered; or with `patient`, for one that can do without for a while, when it is
   * known that this takes longer.
   *
   * @throws where nobody would answer it
   */
  async serve({ id, name, network: { ip, mac } }: Instance, { patient = false } = {}): Promise<void> {
    if (ip === null || mac === null) return;
    const before = this.#lines.get(id);
    this.#lines.set(id, [mac, ip, ...(NO_NAME.test(name) ? [] : [name]), "infinite"].join());
    try {
      await this.#apply();
    } catch (error) {
      if (patient) return this.#revive(error);
      if (before === undefined) this.#lines.delete(id);
      throw error;
    }
  }

  async forget(id: string): Promise<void> {
    if (this.#lines.delete(id)) await this.#apply().catch((error) => this.#revive(error));
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#closing.abort(new Error("the host is closing"));
    await this.#reviving;
    await this.#turn;
    await this.#stop();
  }

  /** Brings what is there to what is wanted, one after the other. */
  async #apply(): Promise<void> {
    const turn = this.#turn.then(() => this.#settle());
    this.#turn = turn.catch(() => {});
    await turn;
  }

  async #settle(): Promise<void> {
    this.#closing.signal.throwIfAborted();
    const text = [...this.#lines.values()].map((line) => `${line}\n`).join("");
    if (text === "") return await this.#stop();
    const changed = text !== this.#written;
    if (changed) {
      // In place, for it has this very file open; whoever it runs as may read it there.
      writeFileSync(this.#hosts, text);
      chmodSync(this.#hosts, 0o644);
      this.#written = text;
    }
    if (!this.#server) this.#server = await this.#start();
    else if (changed) this.#server.reload();
  }

  async #start(): Promise<Dnsmasq> {
    const { network, owner, log, folder } = this.#options;
    if (!network?.enabled) throw new Error("there is no network");
    await this.#endOther();
    const { bridge, subnet, gateway } = network;
    const server = await Dnsmasq.start({ bridge, subnet, gateway, hosts: this.#hosts, owner, log });
    writeFileSync(`${this.#pid}.tmp`, JSON.stringify({ ...server.main, boot: bootId(), owner: ownerOf(folder) }));
    renameSync(`${this.#pid}.tmp`, this.#pid);
    server.ended.then((said) => {
      if (this.#server !== server) return;
      this.#server = undefined;
      this.#revive(new Error(`it ended: ${said}`));
    });
    return server;
  }

  /** Of a host that was killed, should it be there still; that of a data_dir that this one is a copy of is not ours. */
  async #endOther(): Promise<void> {
    if (!existsSync(this.#pid)) return;
    const other = readOther(this.#pid);
    const ours = other?.owner === undefined || other.owner === ownerOf(this.#options.folder);
    if (other?.boot === bootId() && ours && isAlive(other)) {
      signalProcess(other.pid, "SIGKILL");
      await untilDead(other);
    }
    rmSync(this.#pid, { force: true });
  }

  async #stop(): Promise<void> {
    const server = this.#server;
    this.#server = undefined;
    await server?.[Symbol.asyncDispose]();
    if (server) rmSync(this.#pid, { force: true });
  }

  #revive(reason: unknown): void {
    if (this.#closing.signal.aborted) return;
    this.#warn(reason);
    this.#reviving ??= this.#retry().finally(() => this.#reviving = undefined);
  }

  async #retry(): Promise<void> {
    const { signal } = this.#closing;
    const [first, longest] = RETRY_MS;
    for (let pause = first; !signal.aborted && !this.#server && this.#lines.size > 0; pause *= 2) {
      await delay(Math.min(pause, longest), { signal }).catch(() => {}); // closing, which is seen next
      if (signal.aborted) return;
      await this.#apply().catch((error) => this.#warn(error));
    }
  }

  #warn(error: unknown): void {
    const reason = messageOf(error);
    this.#options.log.warn("No dnsmasq for machines that ask for their address; trying again: {reason}", { reason });
  }
}

/** Nothing where it is not whole, as a loss of power may leave it: that ended the process too. */
function readOther(file: string): ProcessId & { boot: string; owner?: string } | undefined {
  try {
    return JSON.parse(readFileSync(file, "utf8"));
  } catch (error) {
    if (error instanceof SyntaxError) return undefined;
    throw error;
  }
}
