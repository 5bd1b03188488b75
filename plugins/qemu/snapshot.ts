/**
 * A machine's state but for its memory, which stays in the file that it is mapped from: some tens of kilobytes, whatever
 * the size of the memory. It goes over a socket, because QEMU may start no program and knows no files for it.
 */
import { chownSync, closeSync, createWriteStream, existsSync, openSync, rmSync } from "node:fs";
import { once } from "node:events";
import { createServer, type Socket } from "node:net";
import { dirname } from "node:path";
import { Transform } from "node:stream";
import { pipeline } from "node:stream/promises";
import { deadline, delay } from "../shared/async.ts";
import { FILES } from "./machine.ts";
import { syncData, syncFolder } from "./memory.ts";
import type { Qmp } from "./qmp.ts";
import type { Owner, Records } from "./records.ts";

/** Milliseconds that the transfer may take, without and with the memory. */
const [TRANSFER_MS, FULL_MS] = [30_000, 600_000];
/** Milliseconds between two looks at how far it is: the first, and the longest. */
const [FIRST_MS, LONGEST_MS] = [1, 20];
/** Bytes of a state without its memory, which are some tens of thousands; and how often a page of memory may be in it. */
const [MAX_STATE, MAX_COPIES] = [64 * 1024 * 1024, 1.1];
/** Bytes per second: as fast as it goes. */
const MAX_BANDWIDTH = 2 ** 40;
/** Memory that is shared with a file is left out of the transfer, unless all of it is wanted. */
const capabilities = (full: boolean) => ({ capabilities: [{ capability: "x-ignore-shared", state: !full }] });

/** What sleeps can never wake: its memory is gone, or QEMU refuses its state. */
export class Unrestorable extends Error {
  override readonly name = "Unrestorable";
}

interface TransferOptions {
  /** Whether the memory goes with it, for it has no file of its own. */
  full: boolean;
  signal: AbortSignal;
}

/**
 * Writes the state of a stopped machine to `state.tmp`; it is on disk when this resolves, and the machine still there.
 *
 * @throws where QEMU says why it cannot, or sends more than a state can be
 */
export async function saveState(
  qmp: Qmp,
  records: Records,
  owner: Owner | null,
  { full, signal }: TransferOptions,
): Promise<void> {
  const [file, path] = [records.path("state.tmp"), records.path("out.sock")];
  dropState(records);
  const most = MAX_STATE + (full ? records.launch()!.memory.bytes * MAX_COPIES : 0);
  await qmp.execute("migrate-set-capabilities", capabilities(full));
  // Bound by way of its folder: the path itself may be longer than that of a socket can be.
  const folder = openSync(records.folder, "r");
  const server = createServer();
  server.maxConnections = 1;
  const given = new AbortController();
  let excess: Error | undefined;
  const bound = atMost(most, (error) => excess = error);
  try {
    server.listen(`/proc/self/fd/${folder}/out.sock`);
    await once(server, "listening");
    if (owner) chownSync(path, owner.uid, owner.gid);
    const received = once(server, "connection", { signal: given.signal })
      .then(([socket]) =>
        pipeline(socket as Socket, bound, createWriteStream(file, { mode: 0o600 }), { signal: given.signal })
      );
    received.catch(() => {}); // seen below, unless QEMU says before why it sends nothing
    await qmp.execute("migrate-set-parameters", { "max-bandwidth": MAX_BANDWIDTH }, { signal });
    await qmp.execute("migrate", { uri: "unix:out.sock" }, { signal });
    await transferred(qmp, { full, signal });
    await deadline(received, TRANSFER_MS, "Writing the state");
    await syncData(file);
  } catch (error) {
    dropState(records);
    throw excess ?? error;
  } finally {
    given.abort(new Error("it is over"));
    server.close();
    closeSync(folder);
    rmSync(path, { force: true });
  }
}

/** Removes what a save that was given up, or its host that died, has left: it may be as large as the memory. */
export function dropState(records: Records): void {
  for (const name of ["state.tmp", "out.sock"]) rmSync(records.path(name), { force: true });
}

function atMost(bytes: number, exceeded: (error: Error) => void): Transform {
  let left = bytes;
  return new Transform({
    transform(chunk, _encoding, done) {
      left -= chunk.length;
      if (left >= 0) return done(null, chunk);
      const error = new Error(`QEMU sends a state of more than ${bytes} bytes`);
      exceeded(error);
      done(error);
    },
  });
}

/** Has a machine that was started for it take over the state that it has open; it does not run yet. */
export async function loadState(qmp: Qmp, { full, signal }: TransferOptions): Promise<void> {
  // In one go: they are done one after the other.
  await Promise.all([
    qmp.execute("migrate-set-capabilities", capabilities(full), { signal, timeout: TRANSFER_MS }),
    qmp.execute("migrate-incoming", { uri: `fd:${FILES.state}` }, { signal, timeout: TRANSFER_MS }),
  ]);
  await transferred(qmp, { full, signal });
}

async function transferred(qmp: Qmp, { full, signal }: TransferOptions): Promise<void> {
  const within = full ? FULL_MS : TRANSFER_MS;
  const end = performance.now() + within;
  for (let pause = FIRST_MS;; pause = Math.min(pause * 1.5, LONGEST_MS)) {
    const info = await qmp.execute("query-migrate", {}, { signal }) as { status?: string; "error-desc"?: string };
    if (info.status === "completed") return;
    if (info.status === "failed" || info.status === "cancelled") {
      throw new Error(`the state could not be transferred: ${info["error-desc"] ?? info.status}`);
    }
    if (performance.now() > end) throw new Error(`the state was not transferred within ${within} ms`);
    await delay(pause, { signal });
  }
}

/** Makes a machine run again whose {@linkcode saveState} was given up. */
export async function cancelSave(qmp: Qmp): Promise<void> {
  await qmp.execute("migrate_cancel");
  const end = performance.now() + TRANSFER_MS;
  for (;;) {
    const { status } = await qmp.execute("query-migrate") as { status?: string };
    if (!["setup", "active", "device", "cancelling"].includes(status ?? "none") || performance.now() > end) break;
    await delay(FIRST_MS);
  }
  await qmp.execute("cont");
}

/** Resolves when the memory is on disk. */
export async function syncMemory(records: Records): Promise<void> {
  await syncData(existsSync(records.base) ? records.base : records.ram);
  await syncFolder(dirname(records.ram));
}
