import { createHash } from "node:crypto";
import { type ApiCall, DormouseError, type Hypervisor, type PluginHooks, type Store } from "../../main.ts";
import { bodyOf } from "./errors.ts";

const KEEP_FOR = 24 * 3_600_000;
const KEEP_AT_MOST = 10_000;
const MIGRATIONS = [
  `CREATE TABLE idempotency (
     id TEXT PRIMARY KEY,
     body_hash TEXT NOT NULL,
     created_at INTEGER NOT NULL,
     instance_id TEXT,
     status INTEGER,
     answer TEXT
   ) STRICT, WITHOUT ROWID;
   CREATE INDEX idempotency_created_at ON idempotency (created_at);`,
];

/** An answer that can be given again: its status and its JSON text. */
export interface Answer {
  status: number;
  text: string;
}
interface Row {
  body_hash: string;
  instance_id: string | null;
  status: number | null;
  answer: string | null;
}

/**
 * Answers a creation that is asked for twice under one `Idempotency-Key` with one instance. The key is on disk before the
 * creation begins, and the instance's id joins it in the transaction of the instance's row. So after a crash at any point
 * the key leads to the instance, or to none that was ever there, and then it is free again.
 */
export class Idempotency {
  readonly #store: Store;
  readonly #hypervisor: Hypervisor;
  readonly #running = new Map<string, { bodyHash: string; answer: Promise<Answer> }>();

  constructor(store: Store, hypervisor: Hypervisor, hooks: PluginHooks) {
    this.#store = store;
    this.#hypervisor = hypervisor;
    store.migrate("api", MIGRATIONS);
    const join = store.db.prepare("UPDATE idempotency SET instance_id = ? WHERE id = ? AND status IS NULL");
    hooks.commit("instance:commit", ({ event: { action, instance_id, detail } }) => {
      if (action !== "create" || typeof detail.idempotency_id !== "string") return;
      join.run(instance_id, detail.idempotency_id);
    });
  }

  /**
   * The answer of `work`, or that of the request before with the same key: also when that one is still under way.
   * `work` is handed the origin detail by which the instance is recognised. A refusal (4xx) is an answer too and is kept;
   * what failed on our side is not.
   *
   * @throws {DormouseError} `idempotency_conflict` where the body is another one, `invalid_request` for a wrong key
   */
  async once(call: ApiCall, work: (detail: Record<string, unknown>) => Promise<Answer>): Promise<Answer> {
    const key = call.headers.get("Idempotency-Key");
    if (key === null) return await work({});
    if (!/^[\x21-\x7e]{1,255}$/.test(key)) {
      const message = "Wrong Idempotency-Key: expected 1 to 255 printable ASCII characters without spaces";
      throw new DormouseError("invalid_request", message);
    }
    // Scoped by the token; hashed, for the id shows in events, and a key may be used as a secret.
    const id = sha256(JSON.stringify([call.origin.actor, key]));
    const bodyHash = sha256(JSON.stringify(call.body));
    const running = this.#running.get(id);
    const row = running ? undefined : this.#find(id);
    if ((running?.bodyHash ?? row?.body_hash ?? bodyHash) !== bodyHash) {
      throw new DormouseError("idempotency_conflict", `Idempotency-Key "${key}" was used with another body`);
    }
    if (running) return await running.answer;
    const before = row && this.#answerOf(row);
    if (before) return before;
    const answer = this.#run(id, bodyHash, work).finally(() => this.#running.delete(id));
    this.#running.set(id, { bodyHash, answer });
    return await answer;
  }

  async #run(
    id: string,
    bodyHash: string,
    work: (detail: Record<string, unknown>) => Promise<Answer>,
  ): Promise<Answer> {
    this.#begin(id, bodyHash);
    let answer: Answer;
    try {
      answer = await work({ idempotency_id: id });
    } catch (error) {
      if (!(error instanceof DormouseError) || error.status >= 500) {
        this.#store.db.prepare("DELETE FROM idempotency WHERE id = ?").run(id);
        throw error;
      }
      answer = { status: error.status, text: JSON.stringify(bodyOf(error)) };
    }
    const { db } = this.#store;
    db.prepare("UPDATE idempotency SET status = ?, answer = ? WHERE id = ?").run(answer.status, answer.text, id);
    return answer;
  }

  #find(id: string): Row | undefined {
    const statement = this.#store.db.prepare(
      "SELECT body_hash, instance_id, status, answer FROM idempotency WHERE id = ? AND created_at > ?",
    );
    return statement.get(id, Date.now() - KEEP_FOR) as Row | undefined;
  }

  /** Of a row that a host before this one left without an answer, the instance is the answer if it is there. */
  #answerOf({ status, answer, instance_id }: Row): Answer | undefined {
    if (status !== null && answer !== null) return { status, text: answer };
    const instance = instance_id === null ? undefined : this.#hypervisor.find(instance_id);
    return instance && { status: 201, text: this.#hypervisor.presentJson(instance) };
  }

  #begin(id: string, bodyHash: string): void {
    const { db } = this.#store;
    this.#store.transaction(() => {
      db.prepare("DELETE FROM idempotency WHERE created_at <= ?").run(Date.now() - KEEP_FOR);
      // The oldest make room, but none whose creation is under way.
      db.prepare(
        `DELETE FROM idempotency WHERE id IN (
           SELECT id FROM idempotency WHERE status IS NOT NULL ORDER BY created_at
           LIMIT max(0, (SELECT count(*) FROM idempotency) - ?))`,
      ).run(KEEP_AT_MOST - 1);
      db.prepare("INSERT OR REPLACE INTO idempotency (id, body_hash, created_at) VALUES (?, ?, ?)")
        .run(id, bodyHash, Date.now());
    });
  }
}

function sha256(text: string): string {
  return createHash("sha256").update(text).digest("base64url");
}
