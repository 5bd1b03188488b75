import { accessSync, constants } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { DormouseError, type Instance } from "../../main.ts";
import { messageOf } from "../shared/errors.ts";
import { hasCapability } from "../shared/proc.ts";
import { findIn, type Found } from "./root.ts";
import { type Identity, resolveIdentity } from "../shared/identity.ts";

/** The programs of this machine that a start goes through, by their absolute paths. */
export interface Tools {
  readonly env: string;
  readonly ip: string | undefined;
  readonly nsenter: string | undefined;
  readonly setsid: string;
  readonly unshare: string | undefined;
}

/** What to run, in whose name and in which network; checked. */
export interface Command {
  /** Where the first program of `argv` begins. */
  readonly directory: string;
  readonly argv: readonly string[];
  /** What `argv` needs in its environment to make that of the program. */
  readonly env: Readonly<Record<string, string>>;
}

/** What the host may do for its instances. */
export interface Powers {
  readonly users: boolean;
  readonly roots: boolean;
  readonly namespaces: boolean;
}

export interface CommandContext {
  readonly tools: Tools;
  readonly powers: Powers;
  /** The PATH of instances that have none in their `env`. */
  readonly path: string;
}

/** A file for `nsenter`, `"none"` for a network without any interface but the loopback, null for the host's own. */
export type NetworkOf = { readonly file: string } | "none" | null;

/** What of an instance and of an exec makes a command. */
export type Wanted = Pick<Instance, "image" | "env" | "working_dir" | "run_as"> & {
  argv: readonly string[];
  /** What `argv` is called where it came from. */
  field: "cmd" | "command";
};

/**
 * Becomes a command with exactly the variables that it finds as the values of DORMOUSE_ENV_1 and so on. They come that
 * way, and not as arguments, because everybody on the machine may read the arguments of a shim, for as long as it runs.
 * By now it is in the network and has the user that it should have: whoever started it is told so.
 */
const ENVIRONMENT = `
env=$1 left=$2
shift 2
while [ "$left" -gt 0 ]; do
  eval "variable=\\$DORMOUSE_ENV_$left"
  set -- "$variable" "$@"
  left=$((left - 1))
done
(trap '' PIPE; echo started >&3) 2>/dev/null
exec 3>&-
exec "$env" -i -- "$@"
`;

const HOST = "host";
const FOLDER = "dir:";

/** The directory that is the instance's root, as this process sees it. */
export function rootOf({ image }: Pick<Instance, "image">): string {
  return image.startsWith(FOLDER) ? image.slice(FOLDER.length) : "/";
}

/**
 * Builds the command line that enters the network, drops to the user, sets exactly the environment and becomes the
 * program, after checking all that can be checked before.
 *
 * @throws {DormouseError} `invalid_request` with the field that is wrong
 */
export async function commandOf(wanted: Wanted, network: NetworkOf, context: CommandContext): Promise<Command> {
  const { tools, powers } = context;
  const folder = wanted.image.startsWith(FOLDER);
  const root = checkImage(wanted, powers);
  const identity = await checkUser(wanted, powers);
  const [program] = wanted.argv;
  if (program === undefined || program === "") {
    throw wrong(wanted.field, "there is nothing to run");
  }
  const working = checkWorkingDirectory(wanted, root);
  const home = identity?.home ?? process.env.HOME ?? "/";
  const env: Record<string, string> = {
    PATH: context.path,
    HOME: !folder ? home : (identity?.uid ?? 0) === 0 ? "/root" : "/",
    ...wanted.env,
  };
  checkProgram(program, { root, working, path: env.PATH, field: wanted.field });
  const variables = Object.entries(env).map(([name, value]) => `${name}=${value}`);
  const passed = Object.fromEntries(variables.map((variable, i) => [`DORMOUSE_ENV_${i + 1}`, variable]));
  const set = ["/bin/sh", "-c", ENVIRONMENT, "dormouse-env", tools.env, String(variables.length)];
  const become = identity ? [`--setgid=${identity.gid}`, `--setuid=${identity.uid}`] : [];
  const enter = enterNetwork(network, tools);
  if (!folder) {
    // `env` would take it for one more variable.
    if (program.includes("=")) throw wrong(wanted.field, `the program's name holds "=": "${program}"`);
    const drop = become.length > 0 ? [tools.unshare!, ...become, "--"] : [];
    return { directory: working, argv: [...enter, ...drop, ...set, ...wanted.argv], env: passed };
  }
  // From here on programs of this machine run with the user's variables, so none may load code into them.
  const loader = Object.keys(env).find((name) => name.startsWith("LD_") || name === "GLIBC_TUNABLES");
  if (loader) throw wrong("env", `"${loader}" cannot be set for an image of a directory: it would act outside of it`);
  const change = [tools.unshare!, `--root=${root}`, `--wd=${working}`, ...become, "--"];
  return { directory: "/", argv: [...enter, ...set, ...change, ...wanted.argv], env: passed };
}

function enterNetwork(network: NetworkOf, { nsenter, unshare, ip }: Tools): string[] {
  if (network === null) return [];
  if (network !== "none") return [nsenter!, `--net=${network.file}`, "--"];
  const isolated = [unshare!, "--net", "--"];
  return ip === undefined ? isolated : [...isolated, "/bin/sh", "-c", '"$0" link set lo up; exec "$@"', ip];
}

function checkImage(wanted: Wanted, { roots }: Powers): string {
  if (wanted.image === HOST) return "/";
  const root = rootOf(wanted);
  if (!wanted.image.startsWith(`${FOLDER}/`)) {
    throw wrong("image", `expected "host" or "dir:/path", found "${wanted.image}"`);
  }
  if (!roots) throw wrong("image", `"${wanted.image}" needs a host that runs as root (CAP_SYS_CHROOT)`);
  const found = reach("/", root);
  if (!found?.stats.isDirectory()) throw wrong("image", `no directory "${root}"`);
  return found.path;
}

async function checkUser({ run_as }: Wanted, { users }: Powers): Promise<Identity | undefined> {
  if (run_as === null) return undefined;
  if (!users) throw wrong("run_as", `"${run_as}" needs a host that runs as root (CAP_SETUID, CAP_SETGID)`);
  try {
    return await resolveIdentity(run_as);
  } catch (error) {
    if (error instanceof RangeError) throw wrong("run_as", messageOf(error));
    throw error;
  }
}

function checkWorkingDirectory({ working_dir }: Wanted, root: string): string {
  if (working_dir === null || working_dir === "") return "/";
  if (!working_dir.startsWith("/")) throw wrong("working_dir", `expected an absolute path, found "${working_dir}"`);
  if (!reach(root, working_dir)?.stats.isDirectory()) throw wrong("working_dir", `no directory "${working_dir}"`);
  return working_dir;
}

/** As `execvp` looks for it, so that a slip of the finger is told before anything is made. */
function checkProgram(program: string, at: { root: string; working: string; path: string; field: string }): void {
  const { root, working, path, field } = at;
  const candidates = program.includes("/")
    ? [program.startsWith("/") ? program : join(working, program)]
    : path.split(":").map((folder) => join(folder.startsWith("/") ? folder : join(working, folder), program));
  let seen = false;
  for (const candidate of candidates) {
    const found = reach(root, candidate);
    if (!found || found.stats.isDirectory()) continue;
    if (isExecutable(found)) return;
    seen = true;
  }
  const why = seen ? "is not executable" : program.includes("/") ? "does not exist" : `is not in PATH ${path}`;
  throw wrong(field, `program "${program}" ${why}`);
}

function isExecutable({ path, stats }: Found): boolean {
  try {
    accessSync(path, constants.X_OK);
    return (stats.mode & 0o111) !== 0;
  } catch {
    // Not for us, and so not for what we start.
    return false;
  }
}

/** What is there for us: where we may not look, or would look for ever, there is nothing. */
function reach(root: string, path: string): Found | undefined {
  try {
    return findIn(root, path);
  } catch (error) {
    if (["EACCES", "ELOOP", "ENAMETOOLONG"].includes((error as NodeJS.ErrnoException).code ?? "")) return undefined;
    throw error;
  }
}

function wrong(field: string, why: string): DormouseError {
  return new DormouseError("invalid_request", `Wrong value of "${field}": ${why}`, { details: { field } });
}

export function powersOf(): Powers {
  return {
    users: hasCapability("CAP_SETUID") && hasCapability("CAP_SETGID"),
    roots: hasCapability("CAP_SYS_CHROOT"),
    namespaces: hasCapability("CAP_SYS_ADMIN"),
  };
}

/** The tools of this machine, or the name of one that is missing and needed. */
export function findTools(path: string, { users, roots, namespaces }: Powers): Tools | string {
  const find = (name: string) => {
    for (const folder of path.split(":").filter((folder) => folder.startsWith("/"))) {
      // By the name that it was found under, not the one it leads to: one program may serve several names.
      const file = join(folder, name);
      const found = reach("/", file);
      if (found && isExecutable(found)) return file;
    }
  };
  const [env, ip, nsenter, setsid, unshare] = ["env", "ip", "nsenter", "setsid", "unshare"].map(find);
  if (!env) return "env";
  if (!setsid) return "setsid";
  if (namespaces && !nsenter) return "nsenter";
  if ((users || roots || namespaces) && !unshare) return "unshare";
  return { env, ip, nsenter, setsid, unshare };
}
