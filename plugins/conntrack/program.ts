import { setImmediate } from "node:timers/promises";
import { execa, ExecaError } from "execa";
import type { Flow } from "../../main.ts";
import { delay } from "../shared/async.ts";
import { messageOf } from "../shared/errors.ts";
import { CommandError, run } from "../shared/run.ts";
import { WatchedAddresses } from "./addresses.ts";
import { Backoff } from "./backoff.ts";
import type { ConntrackListener, ConntrackSource, ConntrackStats, SourceOptions } from "./flow.ts";
import { LineReader, Splitter } from "./line.ts";
import type { Counts } from "./message.ts";
import { Reports, told } from "./reports.ts";

/**
 * conntrack-tools 1.4.7 and older take the buffer's size and do not use it for events: those have the kernel's default,
 * and overflow more often. To raise that default for the start would change it for the whole machine.
 */
const EVENTS = ["-E", "-b", String(40 * 1024 * 1024)];
/** Without a family, older versions show IPv4 alone. */
const TABLES = [["-L", "-f", "ipv4"], ["-L", "-f", "ipv6"]];
const ADVICE = "The conntrack program misses events when many come at once, as its buffer is the machine's default; " +
  "a larger net.core.rmem_default before its start helps, and so does Deno, where no program is needed";
const OVERFLOW = /\bENOBUFS\b/;
/** Milliseconds until the program must have subscribed or caught up, and until it must have shown the table. */
const SETTLE = 10_000;
const DUMP = 60_000;
/** Characters of its stderr that are kept, to say why it ended. */
const KEPT = 2_000;
const NETFILTER = "12"; // NETLINK_NETFILTER
const GROUPS = 0b111; // those of new, changed and destroyed flows

/** Conntrack by the `conntrack` program, where there is no FFI. */
export class ProgramSource implements ConntrackSource {
  readonly name = "program";
  readonly #options: SourceOptions;
  readonly #counts: Counts = { messages: 0, skipped: 0, malformed: 0 };
  readonly #closing = new AbortController();
  readonly #dumps = new Set<Promise<Flow[]>>();
  #reports: Reports | undefined;
  #running: Promise<void> | undefined;

  constructor(options: SourceOptions) {
    this.#options = options;
  }

  start(listener: ConntrackListener): void {
    if (this.#running) throw new TypeError("Cannot start the conntrack source: it was started before");
    this.#reports = new Reports(listener, this.#options.log);
    this.#running = this.#run(this.#reports);
  }

  async dump({ addresses, signal }: { addresses?: ReadonlySet<string>; signal?: AbortSignal } = {}): Promise<Flow[]> {
    const watched = addresses ? new WatchedAddresses(addresses) : this.#options.watched;
    const closing = this.#closing.signal;
    const dumping = this.#dump(watched, signal ? AbortSignal.any([signal, closing]) : closing);
    this.#dumps.add(dumping);
    try {
      return await dumping;
    } finally {
      this.#dumps.delete(dumping);
    }
  }

  async close(): Promise<void> {
    this.#closing.abort(new Error("The conntrack source is closing"));
    this.#reports?.close();
    await Promise.allSettled([this.#running, ...this.#dumps]);
  }

  stats(): ConntrackStats {
    return { ...told(this.#reports), ...this.#counts, receive_buffer: 0 };
  }

  async #run(reports: Reports): Promise<void> {
    const { signal } = this.#closing;
    const backoff = new Backoff();
    // The listener hears nothing before start() has returned.
    await setImmediate();
    while (!signal.aborted) {
      const end = await this.#stream(reports, backoff);
      reports.ended(messageOf(end));
      await delay(backoff.next(), { signal }).catch(() => {});
    }
  }

  /** Resolves with why it ended. */
  async #stream(reports: Reports, backoff: Backoff): Promise<unknown> {
    const child = execa("conntrack", EVENTS, this.#spawn());
    const reader = new LineReader(this.#counts, this.#options.watched);
    const read = (line: string) => reader.read(line, reports.event);
    const lines = new Splitter();
    child.stdout.setEncoding("latin1").on("data", (text: string) => lines.push(text, read));
    let over = false;
    let stderr = "";
    let overflows = 0;
    let settling = false;
    let failure: unknown;

    // The program never says that it has subscribed. And after an overflow the kernel drops all that comes until the
    // program has read what waits, without a further word: only then is what it tells whole again.
    const settle = async () => {
      if (settling) return;
      settling = true;
      try {
        for (const late = performance.now() + SETTLE; !over; await delay(2)) {
          const before = overflows;
          const waiting = child.pid === undefined ? undefined : await bytesWaiting(child.pid);
          if (over) return;
          if (waiting !== undefined && (waiting === 0 || overflows === 0) && overflows === before) {
            backoff.connected();
            return reports.isConnected();
          }
          if (performance.now() > late) throw new Error(`the conntrack program did not listen within ${SETTLE} ms`);
        }
      } catch (error) {
        failure = error;
        child.kill("SIGKILL");
      } finally {
        settling = false;
      }
    };

    const messages = new Splitter();
    child.stderr.setEncoding("utf8").on("data", (text: string) =>
      messages.push(text, (line) => {
        if (OVERFLOW.test(line)) {
          if (overflows++ === 0) this.#options.log.warn(ADVICE);
          reports.overflow();
          void settle();
        } else if (!line.startsWith("NOTICE")) stderr = `${stderr}${line}\n`.slice(-KEPT);
      }));
    const ended = child.then(
      () => new Error("the conntrack program ended"),
      (error) => error instanceof ExecaError ? new CommandError("conntrack -E", error, stderr.trim()) : error,
    ).finally(() => over = true);
    void settle();
    const end = await ended;
    return failure ?? end;
  }

  #spawn() {
    // A program that is told to end may wait for an event to do so; it has nothing to put in order.
    return {
      cancelSignal: this.#closing.signal,
      killSignal: "SIGKILL",
      stdin: "ignore",
      buffer: false,
      env: { LC_ALL: "C" },
    } as const;
  }

  async #dump(watched: WatchedAddresses | undefined, signal: AbortSignal): Promise<Flow[]> {
    signal.throwIfAborted();
    const counts: Counts = { messages: 0, skipped: 0, malformed: 0 };
    const reader = new LineReader(counts, watched);
    const flows: Flow[] = [];
    const read = (line: string) => reader.read(line, (_, flow) => void flows.push(flow));
    try {
      for (const args of TABLES) {
        const child = execa("conntrack", args, { ...this.#spawn(), cancelSignal: signal, timeout: DUMP });
        const lines = new Splitter();
        child.stdout.setEncoding("latin1").on("data", (text: string) => lines.push(text, read));
        let stderr = "";
        child.stderr.setEncoding("utf8").on("data", (text: string) => stderr = (stderr + text).slice(-KEPT));
        await child.catch((error) => {
          signal.throwIfAborted();
          if (!(error instanceof ExecaError)) throw error;
          throw new CommandError(`conntrack ${args.join(" ")}`, error, stderr.trim());
        });
        lines.end(read);
      }
    } finally {
      this.#counts.messages += counts.messages;
      this.#counts.skipped += counts.skipped;
      this.#counts.malformed += counts.malformed;
    }
    // What cannot be read might be the one flow that keeps an instance awake.
    if (counts.malformed > 0) throw new Error(`Cannot dump conntrack: ${counts.malformed} lines could not be read`);
    return flows;
  }
}

/**
 * The bytes of events that wait for a process to read them; undefined where it has not subscribed to all of them yet.
 * Read by other programs, because a runtime that refuses FFI may refuse `/proc` too, as Deno does.
 */
async function bytesWaiting(pid: number): Promise<number | undefined> {
  let table: string;
  let descriptors: string;
  try {
    table = await run("cat", [`/proc/${pid}/net/netlink`]);
    descriptors = await run("ls", ["-l", `/proc/${pid}/fd`]);
  } catch (error) {
    // The process, or one of its descriptors, went away meanwhile.
    if (error instanceof CommandError && error.exitCode !== null) return undefined;
    throw error;
  }
  for (const line of table.split("\n")) {
    // sk, Eth (the protocol), Pid, Groups, Rmem, Wmem, Dump, Locks, Drops, Inode
    const [, protocol, , groups, waiting, , , , , inode] = line.trim().split(/ +/);
    const listens = protocol === NETFILTER && (parseInt(groups, 16) & GROUPS) === GROUPS;
    if (listens && descriptors.includes(`socket:[${inode}]`)) return Number(waiting);
  }
  return undefined;
}
