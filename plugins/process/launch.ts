import { existsSync, mkdirSync, readdirSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { constants } from "node:os";
import { join } from "node:path";
import { readIfThere } from "../shared/files.ts";
import type { ProcessId } from "../shared/proc.ts";

/**
 * What a start is about, on disk before anything of it runs. The first line of the file is the generation, for the
 * shim; the second is this as JSON.
 */
export interface Launch {
  readonly generation: string;
  /** The data_dir that it belongs to, so that a copy of a data_dir does not take over the processes of the first. */
  readonly owner: string;
  /** The folders of its cgroup; none where it runs without. */
  readonly cgroups: readonly string[];
  /** Whether it has a network of its own. */
  readonly isolated: boolean;
  /** The host's end of its veth. */
  readonly device: string | null;
}

/** Who runs, written by the workload's own process before it becomes the program. */
export interface Claim {
  readonly main: ProcessId;
  /** Waits for the program and writes how it ended. */
  readonly shim: ProcessId;
  /** The machine's start that it belongs to: after another one, nothing of it runs and its pids mean nothing. */
  readonly boot: string;
}

export interface Exit {
  readonly exit_code: number | null;
  readonly exit_message: string | null;
}

/** The files of one instance: `launch`, `GENERATION.pid`, `frozen` in `run/`; its exit is in a folder that is watched. */
export class Records {
  readonly folder: string;
  readonly #run: string;
  readonly #exits: string;
  readonly #id: string;

  constructor(folder: string, exits: string, id: string) {
    this.folder = folder;
    this.#run = join(folder, "run");
    this.#exits = exits;
    this.#id = id;
  }

  get run(): string {
    return this.#run;
  }

  get log(): string {
    return join(this.folder, "app.log");
  }

  exitFile(generation: string): string {
    return join(this.#exits, `${this.#id}.${generation}`);
  }

  make(): void {
    mkdirSync(this.#run, { recursive: true });
  }

  /** The newest launch. @throws where the file is there and cannot be understood */
  launch(): Launch | undefined {
    const text = readIfThere(join(this.#run, "launch"));
    if (text === undefined) return undefined;
    const launch = JSON.parse(text.slice(text.indexOf("\n") + 1)) as Launch;
    if (typeof launch.generation === "string" && Array.isArray(launch.cgroups)) return launch;
    throw new Error(`Cannot read ${join(this.#run, "launch")}: it is not a launch`);
  }

  /** Makes this the newest launch. No program of an earlier one can begin any more once this returns. */
  begin(launch: Launch): void {
    replace(join(this.#run, "launch"), `${launch.generation}\n${JSON.stringify(launch)}\n`);
    for (const name of readdirSync(this.#run)) {
      if (/^[0-9a-f]+\.(pid|tmp|err)$/.test(name)) rmSync(join(this.#run, name), { force: true });
    }
    this.forgetExits();
  }

  /** Who took up the launch; undefined while nobody has, and for good once it is superseded. */
  claim({ generation }: Launch): Claim | undefined {
    return this.#readClaim(`${generation}.pid`);
  }

  /** All claims that there are, for when the launch itself cannot be read. */
  claims(): Claim[] {
    if (!existsSync(this.#run)) return [];
    const files = readdirSync(this.#run).filter((name) => name.endsWith(".pid"));
    return files.map((file) => this.#readClaim(file)).filter((claim) => claim !== undefined);
  }

  /**
   * Takes the launch's claim away, so that its program never begins; returns the claim where the program was faster.
   * Either this or the workload's `ln` makes the file, never both.
   */
  supersede(launch: Launch): Claim | undefined {
    try {
      writeFileSync(join(this.#run, `${launch.generation}.pid`), "", { flag: "wx" });
      return undefined;
    } catch (error) {
      const { code } = error as NodeJS.ErrnoException;
      if (code === "ENOENT") return undefined;
      if (code !== "EEXIST") throw error;
      return this.claim(launch);
    }
  }

  /** How the launch ended, once its shim has written it. */
  exit({ generation }: Launch): Exit | undefined {
    const text = readIfThere(this.exitFile(generation));
    if (text === undefined) return undefined;
    const [code, signalled] = text.trim().split(" ").map(Number);
    return { exit_code: code, exit_message: describeExit(code, signalled === 1) };
  }

  forgetExits(): void {
    for (const name of readdirSync(this.#exits)) {
      if (name.startsWith(`${this.#id}.`)) rmSync(join(this.#exits, name), { force: true });
    }
  }

  /** Why it is frozen, written before it is: `Paused` where nobody said. */
  get mark(): "Paused" | "Standby" | undefined {
    const text = readIfThere(join(this.#run, "frozen"));
    return text === "Standby" || text === "Paused" ? text : undefined;
  }

  set mark(mark: "Paused" | "Standby" | undefined) {
    const file = join(this.#run, "frozen");
    if (mark) replace(file, mark);
    else rmSync(file, { force: true });
  }

  #readClaim(file: string): Claim | undefined {
    const [pid, started, shim, shimStarted, boot] = readIfThere(join(this.#run, file))?.trim().split(" ") ?? [];
    if (boot === undefined) return undefined;
    return {
      main: { pid: Number(pid), started: Number(started) },
      shim: { pid: Number(shim), started: Number(shimStarted) },
      boot,
    };
  }
}

// A shell tells 128+n for signal n, and a program may return the same number by itself. The shell's own message about
// the signal tells them apart, except for those two that shells pass over in silence.
const SILENT = ["SIGINT", "SIGPIPE"];

function describeExit(code: number, signalled: boolean): string {
  const name = Object.entries(constants.signals).find(([, number]) => number === code - 128)?.[0];
  return name && (signalled || SILENT.includes(name)) ? `killed by ${name}` : `exited with code ${code}`;
}

function replace(file: string, text: string): void {
  writeFileSync(`${file}.new`, text);
  renameSync(`${file}.new`, file);
}
