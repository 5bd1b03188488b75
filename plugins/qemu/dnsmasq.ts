import { existsSync, readFileSync } from "node:fs";
import { createInterface } from "node:readline";
import type { Logger } from "@logtape/logtape";
import { execa } from "execa";
import ipaddr from "ipaddr.js";
import { deadline } from "../shared/async.ts";
import { isAlive, type ProcessId, processStat, signalProcess } from "../shared/proc.ts";
import { bareEnvironment } from "../shared/programs.ts";
import type { Owner } from "./records.ts";

/** Milliseconds in which it must listen. */
const START_MS = 10_000;
/** Where a machine says whom it asks for names; the second is there where the first names a helper on that machine. */
const RESOLVERS = ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"];
/** What it insists on, of which it needs the last two: packets to those without an address, and a port below 1024. */
const CAPABILITIES = "-all,+net_admin,+net_raw,+net_bind_service";

export interface DnsmasqOptions {
  readonly bridge: string;
  /** `10.88.0.0/16` */
  readonly subnet: string;
  readonly gateway: string;
  /** A file with a line for each machine, as `dhcp-host` takes it. It is changed in place. */
  readonly hosts: string;
  /** Whom it runs as; null for this process's own user. */
  readonly owner: Owner | null;
  readonly log: Logger;
}

/**
 * Answers the machines of one bridge that ask for their address, and nobody else. To all of the bridge at once: for an
 * answer to one alone it would note that one's address itself, in the place of what the bridge has noted for good.
 */
export function dnsmasqArguments({ bridge, subnet, gateway }: DnsmasqOptions): string[] {
  const [, prefix] = ipaddr.IPv4.parseCIDR(subnet);
  const network = ipaddr.IPv4.networkAddressFromCIDR(subnet).toString();
  const mask = ipaddr.IPv4.subnetMaskFromPrefixLength(prefix).toString();
  return [
    // What it was opened is its stdin, which it keeps in this mode only.
    ...["--no-daemon", "--conf-file=/dev/null", "--dhcp-hostsfile=/proc/self/fd/0"],
    ...["--port=0", "--no-resolv", "--no-hosts", "--no-poll"],
    ...[`--interface=${bridge}`, "--except-interface=lo", "--bind-interfaces"],
    ...[`--dhcp-range=${network},static,${mask},infinite`, `--dhcp-lease-max=${2 ** (32 - prefix)}`],
    // It may forget all that it has given out, for that follows from the machine that asks.
    ...["--leasefile-ro", "--dhcp-authoritative", "--dhcp-ignore=tag:!known", "--dhcp-broadcast", "--no-ping"],
    `--dhcp-option=${["option:router", gateway].join()}`,
    `--dhcp-option=${["option:dns-server", ...nameservers()].join()}`,
  ];
}

/** IPv4 addresses of servers for names that machines can reach too. */
export function nameservers(files = RESOLVERS): string[] {
  for (const file of files.filter((each) => existsSync(each))) {
    const found = [...readFileSync(file, "utf8").matchAll(/^nameserver\s+(\d+\.\d+\.\d+\.\d+)\s*$/gm)];
    const reachable = found.map(([, address]) => address).filter((address) => !address.startsWith("127."));
    if (reachable.length > 0) return reachable;
  }
  return [];
}

/** A `dnsmasq` that runs; it dies with this process. */
export class Dnsmasq implements AsyncDisposable {
  readonly main: ProcessId;
  /** Resolves to what it said last. */
  readonly ended: Promise<string>;

  private constructor(main: ProcessId, ended: Promise<string>) {
    this.main = main;
    this.ended = ended;
  }

  /** Resolves once it listens. @throws where it does not, with what it said */
  static async start(options: DnsmasqOptions): Promise<Dnsmasq> {
    const { owner, hosts, log } = options;
    // By its own user from the beginning: who becomes another one outlives its parent again.
    const drop = owner === null ? [] : [
      ...[`--reuid=${owner.uid}`, `--regid=${owner.gid}`, "--clear-groups", "--no-new-privs"],
      ...[`--inh-caps=${CAPABILITIES}`, `--ambient-caps=${CAPABILITIES}`],
    ];
    const command = ["setpriv", ...drop, "--pdeathsig=KILL", "--", "dnsmasq", ...dnsmasqArguments(options)];
    // Opened here, by who may reach it.
    const child = execa("/bin/sh", ["-c", 'exec "$@" <"$0"', hosts, ...command], {
      stdio: ["ignore", "ignore", "pipe"],
      // A terminal's interrupt is for the host.
      detached: true,
      cleanup: false,
      buffer: false,
      reject: false,
      extendEnv: false,
      env: bareEnvironment(),
    });
    const { pid, stderr } = child.nodeChildProcess;
    const { promise: listens, resolve } = Promise.withResolvers<boolean>();
    let last = "it said nothing";
    if (stderr) {
      createInterface({ input: stderr }).on("line", (line) => {
        last = line;
        log.debug("{line}", { line });
        if (/: started, version /.test(line)) resolve(true);
      });
    }
    const ended = child.then(({ originalMessage }) => {
      resolve(false);
      return pid === undefined ? originalMessage ?? last : last;
    });
    const stat = pid === undefined ? undefined : processStat(pid);
    if (!stat) throw new Error(`dnsmasq does not run: ${await ended}`);
    const started = new Dnsmasq({ pid: stat.pid, started: stat.started }, ended);
    try {
      if (await deadline(listens, START_MS, "Starting dnsmasq")) return started;
      throw new Error(`dnsmasq does not run: ${await ended}`);
    } catch (error) {
      await started[Symbol.asyncDispose]();
      throw error;
    }
  }

  /** Has it read its file again. */
  reload(): void {
    if (isAlive(this.main)) signalProcess(this.main.pid, "SIGHUP");
  }

  async [Symbol.asyncDispose](): Promise<void> {
    // It has nothing to bring to an end.
    if (isAlive(this.main)) signalProcess(this.main.pid, "SIGKILL");
    await this.ended;
  }
}
