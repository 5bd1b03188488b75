/** What the driver has the guest do, beyond running commands: each in as few questions as it takes. */
import { randomBytes } from "node:crypto";
import type { ExecResult, PathInfo } from "../../main.ts";
import { ABSENT } from "../shared/absent.ts";
import { type Agent, AgentError, type CallOptions } from "./agent.ts";
import { execute } from "./exec.ts";
import { MAX_REASON } from "./socket.ts";

export type TaskOptions = Pick<CallOptions, "signal" | "timeout">;

const TIMEOUT_MS = 30_000;
const MAX_OUTPUT = 64 * 1024;
/** Milliseconds in which an agent refuses to shut down, if it does. */
const REFUSAL_MS = 500;

/** A task's command ended otherwise than with 0. */
export class TaskError extends Error {
  override readonly name = "TaskError";
  readonly result: ExecResult;
  constructor(what: string, result: ExecResult) {
    const said = result.stderr.trim().slice(0, MAX_REASON);
    const why = result.timed_out ? "it ran past its deadline" : said || `exit code ${result.exit_code}`;
    super(`Cannot ${what} in the guest: ${why}`);
    this.result = result;
  }
}

/** How far the guest's clock is from the host's, in milliseconds, and how far off that number may be. */
export interface ClockOffset {
  readonly offset: number;
  readonly uncertainty: number;
}

/** Asks for the guest's clock. It is read at some moment between question and answer: in the middle, give or take the half. */
export async function clockOffset(agent: Agent, options: TaskOptions = {}): Promise<ClockOffset> {
  const before = Date.now();
  const nanoseconds = await agent.call("guest-get-time", {}, options) as number;
  const after = Date.now();
  return { offset: nanoseconds / 1e6 - (before + after) / 2, uncertainty: (after - before) / 2 };
}

export interface ClockOptions extends TaskOptions {
  /** Milliseconds by which it may be off; 50 when absent. */
  within?: number;
  /** How often it is set, at most; 4 when absent. */
  rounds?: number;
  /**
   * Called, at most once, when it is right as far as that can be told without an answer: the agent was found, and the
   * question after that, which takes it a fraction of the time, has had more than that.
   */
  told?: () => void;
}

/** Milliseconds that the first question has at least and at most, and that it is expected to take at most. */
const [SHORTEST_MS, LONGEST_MS, EXPECTED_MS] = [5, 40, 10];

/**
 * Sets the guest's clock to the host's, as often as it takes to see it right within so many milliseconds; resolves to
 * what was seen last, which may be worse or leave that open. Setting takes effect before the agent answers, which may
 * be a second later: it writes the time to the machine's own clock too, and where the guest has no program for that it
 * reports an error, which is none to us.
 *
 * @throws as {@linkcode Agent.call}
 */
export async function setClock(
  agent: Agent,
  { within = 50, rounds = 4, told = () => {}, ...options }: ClockOptions = {},
): Promise<ClockOffset> {
  const begin = performance.now();
  await agent.synchronise(options);
  const found = performance.now() - begin;
  const timer = setTimeout(told, Math.min(Math.max(found / 4, SHORTEST_MS), LONGEST_MS));
  try {
    let [late, fastest] = [Math.min(found / 8, EXPECTED_MS), Infinity];
    let seen: ClockOffset = { offset: -Infinity, uncertainty: late };
    for (let round = 0; round < rounds && Math.abs(seen.offset) + seen.uncertainty > within; round++) {
      // A question takes about as long to arrive as others took, of which the fastest was held up by nothing else.
      const time = Math.round((Date.now() + late) * 1e6);
      await agent.call("guest-set-time", { time }, { timeout: TIMEOUT_MS, ...options }).catch((error) => {
        if (!(error instanceof Error && /hwclock/.test(error.message))) throw error;
      });
      seen = await clockOffset(agent, options);
      late = fastest = Math.min(fastest, seen.uncertainty);
    }
    return seen;
  } finally {
    clearTimeout(timer);
  }
}

/** Who a guest is in the network; what is absent stays as it is. */
export interface Identity {
  hostname?: string;
  mac?: string;
  /** With the length of its prefix: `10.88.0.5/16`. It takes the place of all others. */
  ip?: string;
  gateway?: string;
  ip6?: string;
  gateway6?: string;
}

// The device is the one that is no loopback; where there are more, the first. It goes down, for a change of its hardware
// address needs that on some, and comes up with its IPv4 address there already: then the kernel tells the network of it
// (arp_notify), where others may remember whom that address belonged to before. Going down loses addresses of IPv6.
const IDENTIFY = `
set -e
hostname=$1 mac=$2 ip=$3 gw=$4 ip6=$5 gw6=$6
if [ -n "$hostname" ]; then
  echo "$hostname" >/proc/sys/kernel/hostname
  [ ! -f /etc/hostname ] || echo "$hostname" >/etc/hostname
fi
[ -n "$mac$ip$ip6" ] || exit 0
for path in /sys/class/net/*/device; do [ -e "$path" ] && break; done
path=\${path%/device}
device=\${path##*/}
echo 1 >"/proc/sys/net/ipv4/conf/$device/arp_notify"
ip link set "$device" down
[ -z "$mac" ] || ip link set "$device" address "$mac"
if [ -n "$ip" ]; then
  ip -4 addr flush dev "$device"
  ip addr add "$ip" dev "$device"
fi
[ -z "$ip6" ] || echo 0 >"/proc/sys/net/ipv6/conf/$device/accept_dad"
ip link set "$device" up
[ -z "$gw" ] || ip route replace default via "$gw" dev "$device"
[ -z "$ip6" ] || ip -6 addr add "$ip6" dev "$device"
[ -n "$gw6" ] || exit 0
# The address may be one without a subnet, in which the gateway would be.
ip -6 route replace "$gw6" dev "$device"
ip -6 route replace default via "$gw6" dev "$device"
`;

/**
 * Gives the guest another name and another place in the network, by its own `sh` and `ip`. Without `gateway` it has no
 * default route after a change of its place.
 *
 * @throws {TaskError}
 */
export async function identify(agent: Agent, identity: Identity, options: TaskOptions = {}): Promise<void> {
  const { hostname = "", mac = "", ip = "", gateway = "", ip6 = "", gateway6 = "" } = identity;
  const values = [hostname, mac.toLowerCase(), ip, gateway, ip6, gateway6];
  await ask(agent, "set the name and the addresses", ["/bin/sh", "-c", IDENTIFY, "identify", ...values], options);
}

// Bytes that are written to the pool are taken up within a minute. At once, which is what two copies of one guest need
// before they draw any, they are by the ioctl RNDRESEEDCRNG of random(4), 0x5207, which no shell can do.
const RESEED = `open(R, ">", "/dev/urandom") && syswrite(R, join("", <STDIN>)) && ioctl(R, 0x5207, 0) || die "$!\\n"`;
const RESEED_WITHOUT_PERL = `
cat >/dev/urandom || exit 1
python3 -c 'import fcntl; fcntl.ioctl(open("/dev/urandom", "w"), 0x5207)' 2>/dev/null && echo now || echo later
`;

/**
 * Makes the guest's random numbers other than those of every other guest that was restored from the same RAM. Resolves to
 * `later` where it lacks the program (perl or python3) to have the kernel use the new seed before a minute has passed.
 *
 * @throws {TaskError}
 */
export async function reseed(agent: Agent, options: TaskOptions = {}): Promise<"now" | "later"> {
  const input = randomBytes(256);
  const what = "reseed the random numbers";
  try {
    await ask(agent, what, ["perl", "-e", RESEED], options, input);
    return "now";
  } catch (error) {
    if (!(error instanceof AgentError)) throw error; // there is no such program
  }
  const { stdout } = await ask(agent, what, ["/bin/sh", "-c", RESEED_WITHOUT_PERL], options, input);
  return stdout.trim() === "now" ? "now" : "later";
}

// The name may hold anything, a newline included, so it comes last and with a mark after it.
const STAT = `
export LC_ALL=C
stat $1 -c '%f %s' -- "$2" || exit 1
[ "$1" = -L ] || [ ! -L "$2" ] || { readlink -n -- "$2" && printf .; }
`;

/** What is at a path in the guest. @throws {TaskError} where that cannot be told */
export async function stat(agent: Agent, path: string, follow: boolean, options: TaskOptions = {}): Promise<PathInfo> {
  const how = follow ? "-L" : "";
  let result: ExecResult;
  try {
    result = await ask(agent, `look at "${path}"`, ["/bin/sh", "-c", STAT, "stat", how, path], options);
  } catch (error) {
    if (error instanceof TaskError && /No such file|Not a directory/.test(error.result.stderr)) return { ...ABSENT };
    throw error;
  }
  const [, mode, size, target] = /^([0-9a-f]+) (\d+)\n(?:([^]*)\.)?$/.exec(result.stdout) ?? [];
  if (mode === undefined) throw new TaskError(`look at "${path}"`, result);
  const [bits, type] = [parseInt(mode, 16) & 0o7777, parseInt(mode, 16) & 0o170000];
  return {
    exists: true,
    is_dir: type === 0o040000,
    is_file: type === 0o100000,
    is_symlink: type === 0o120000,
    link_target: target ?? null,
    mode: bits,
    size: Number(size),
  };
}

/** Asks the guest to power off; resolves when it has taken that up, or is gone. @throws as {@linkcode Agent.call} */
export function shutdown(agent: Agent, options: TaskOptions = {}): Promise<void> {
  return agent.send("guest-shutdown", { mode: "powerdown" }, REFUSAL_MS, options);
}

async function ask(
  agent: Agent,
  what: string,
  command: string[],
  { signal, timeout = TIMEOUT_MS }: TaskOptions,
  input?: Uint8Array,
): Promise<ExecResult> {
  const result = await execute(agent, {
    command,
    plain: true,
    timeout_ms: timeout,
    max_output: MAX_OUTPUT,
    ...(signal && { signal }),
    ...(input && { input }),
  });
  if (result.exit_code !== 0) throw new TaskError(what, result);
  return result;
}
