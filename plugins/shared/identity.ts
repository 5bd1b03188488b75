import { CommandError, run } from "./run.ts";

/** Whom a program runs as. */
export interface Identity {
  readonly uid: number;
  readonly gid: number;
  readonly home: string;
}

/**
 * Resolves `user`, `uid`, `user:group` or `uid:gid` against the users of this machine. A number needs no entry there;
 * without a group it is the user's own, and the group of the same number for a user that is not known.
 *
 * @throws {RangeError} where a name is not known or a number is none
 */
export async function resolveIdentity(text: string): Promise<Identity> {
  const [user, group, ...rest] = text.split(":");
  if (user === "" || group === "" || rest.length > 0) {
    throw new RangeError('expected "user", "uid", "user:group" or "uid:gid"');
  }
  const entry = await lookUp("passwd", user);
  const known = entry ?? numeric(user, "user");
  if (group === undefined) return known;
  const [, , gid] = (await lookUp("group", group))?.fields ?? [];
  return { ...known, gid: gid === undefined ? numeric(group, "group").gid : Number(gid) };
}

type Entry = Identity & { fields: string[] };

async function lookUp(database: "passwd" | "group", key: string): Promise<Entry | undefined> {
  try {
    const line = await run("getent", ["--", database, key]);
    const fields = line.split("\n")[0].split(":");
    const [, , uid, gid, , home] = fields;
    return { uid: Number(uid), gid: Number(gid), home: home || "/", fields };
  } catch (error) {
    if (error instanceof CommandError && error.exitCode === 2) return undefined;
    throw error;
  }
}

function numeric(text: string, kind: "user" | "group"): Identity {
  if (!/^\d{1,10}$/.test(text)) throw new RangeError(`no ${kind} "${text}" on this machine`);
  const id = Number(text);
  // The last number means "unchanged" to the kernel.
  if (id >= 2 ** 32 - 1) throw new RangeError(`${kind} ${text} is out of range`);
  return { uid: id, gid: id, home: "/" };
}
