/** A QEMU with nothing of the driver's around it, to compare with. */
import { copyFileSync, mkdirSync, rmSync } from "node:fs";
import { join } from "node:path";
import { execa, type ResultPromise } from "execa";
import { Agent } from "../../plugins/qemu/agent.ts";
import type { Image } from "../../plugins/qemu/image.ts";
import { FILES } from "../../plugins/qemu/machine.ts";
import { Qmp } from "../../plugins/qemu/qmp.ts";
import type { Records } from "../../plugins/qemu/records.ts";
import { delay } from "../../plugins/shared/async.ts";

/** Milliseconds between two questions. */
const POLL_MS = 1;
/** Milliseconds for an answer while it copies memory. */
const BUSY_MS = 120_000;

export interface PlainOptions {
  /** Of the machine whose command line and disk it gets. */
  records: Records;
  image: Image;
  /** Made for it, and removed with it. */
  folder: string;
  /** The kind of its memory, and how that is kept: a value of `-object` without id and size. */
  memory: string;
  /** Whether it takes over a state in the place of booting; then it may start programs, which bring that. */
  incoming?: boolean;
  signal: AbortSignal;
}

export class Plain implements AsyncDisposable {
  readonly #folder: string;
  readonly #args: string[];
  readonly #signal: AbortSignal;
  #child: ResultPromise<{ cwd: string; stdin: "ignore"; reject: false; all: true }> | undefined;
  #qmp: Qmp | undefined;

  /** All is ready then for {@linkcode start}. */
  constructor({ records, image, folder, memory, incoming = false, signal }: PlainOptions) {
    [this.#folder, this.#signal] = [folder, signal];
    const launch = records.launch()!;
    const files = [[FILES.kernel, image.kernel], [FILES.initrd, image.initrd], [FILES.disk, image.disk?.file]] as const;
    const args = launch.args.map((arg) =>
      files.reduce((text, [number, path]) => text.replace(`/proc/self/fd/${number}`, path ?? ""), arg)
    );
    if (incoming) args[args.indexOf("-sandbox") + 1] = "off";
    this.#args = [
      ...args,
      ...["-object", `${memory},id=ram,size=${launch.memory.bytes}`],
      ...(incoming ? ["-incoming", "defer"] : []),
    ];
    mkdirSync(join(folder, "run"), { recursive: true });
    if (image.disk) copyFileSync(records.path("overlay.qcow2"), join(folder, "overlay.qcow2"));
  }

  /** Resolves as soon as its monitor answers. @throws with what it said, where it ended first */
  async start(): Promise<void> {
    const child = this.#child = execa("qemu-system-x86_64", this.#args, {
      cwd: this.#folder,
      stdin: "ignore",
      reject: false,
      all: true,
    });
    let ended: string | undefined;
    void child.then(({ all }) => ended = all);
    while (!this.#qmp) {
      if (ended !== undefined) throw new Error(`QEMU ended: ${ended}`);
      try {
        this.#qmp = await Qmp.connect(join(this.#folder, "run", "qmp.sock"), { signal: this.#signal });
      } catch (error) {
        if (!["ENOENT", "ECONNREFUSED"].includes((error as NodeJS.ErrnoException).code ?? "")) throw error;
        await delay(POLL_MS, { signal: this.#signal });
      }
    }
  }

  /** Resolves when QEMU says that its guest runs. */
  async untilRunning(): Promise<void> {
    while ((await this.#ask("query-status")).status !== "running") await delay(POLL_MS, { signal: this.#signal });
  }

  /** Resolves when the guest's agent answers. */
  async answers(): Promise<void> {
    await using agent = new Agent(join(this.#folder, "run", "agent.sock"));
    await agent.ready({ signal: this.#signal });
  }

  /** Writes the state, with all of the memory, to a file, and ends. */
  async save(file: string): Promise<void> {
    await this.#ask("stop");
    await this.#ask("migrate-set-parameters", { "max-bandwidth": 2 ** 40 });
    await this.#ask("migrate", { uri: `exec:cat >${file}` });
    await this.#transferred();
    await this.#qmp!.quit();
    await this.#child;
  }

  /** Takes a state over, and has the guest go on. With `shared`, the state is one that the memory is not in. */
  async load(file: string, { shared = false } = {}): Promise<void> {
    const set = (state: boolean) =>
      this.#ask("migrate-set-capabilities", { capabilities: [{ capability: "x-ignore-shared", state }] });
    if (shared) await set(true);
    await this.#ask("migrate-incoming", { uri: `exec:cat ${file}` });
    await this.#transferred();
    if (shared) await set(false);
    await this.#ask("cont");
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#qmp?.close();
    this.#child?.kill("SIGKILL");
    await this.#child;
    rmSync(this.#folder, { recursive: true, force: true });
  }

  async #transferred(): Promise<void> {
    for (;;) {
      const { status, "error-desc": reason } = await this.#ask("query-migrate");
      if (status === "completed") return;
      if (status === "failed") throw new Error(`The state could not be transferred: ${reason}`);
      await delay(POLL_MS, { signal: this.#signal });
    }
  }

  async #ask(command: string, args: Record<string, unknown> = {}): Promise<Record<string, string>> {
    const options = { timeout: BUSY_MS, signal: this.#signal };
    return await this.#qmp!.execute(command, args, options) as Record<string, string>;
  }
}
