import type { GuardContext, Instance, LifecycleEvent } from "../../main.ts";
import { pooled } from "../shared/async.ts";
import type { Claims } from "./claims.ts";
import type { Elements } from "./elements.ts";
import { guestPortsOf, policyOf, timeoutOf } from "./policy.ts";
import type { Probe, Readiness } from "./readiness.ts";

/** Milliseconds after which an instance that was to sleep or stop, and does neither, is taken for awake again. */
const SETTLE_MS = 2_000;
/** Instances that are looked at side by side. */
const LOOKS = 32;

export type Leaving = "standby" | "stop";

export interface PathsOptions {
  claims: Claims;
  /** Undefined where the kernel forwards nothing: then every connection goes through the listeners. */
  elements: Elements | undefined;
  readiness: Readiness;
  /** Null where it cannot be reached. */
  addressOf(instance: Instance): string | null;
  /** Whether the kernel goes on taking its connections while it sleeps, and we learn of them. */
  queues(instance: Instance): boolean;
  passes(instance: Instance): Probe["passes"];
  find(id: string): Instance | undefined;
}

/**
 * Which way the connections to published ports go: straight to the instance, by an element of the kernel's map, or to
 * the listener, which holds and wakes. An element is there while the instance serves, and is gone before it stops to.
 */
export class Paths implements Disposable {
  readonly #options: PathsOptions;
  readonly #leaving = new Map<string, { what: Leaving; timer: ReturnType<typeof setTimeout> | undefined }>();
  readonly #ports = new Map<string, readonly number[]>();

  constructor(options: PathsOptions) {
    this.#options = options;
  }

  leaving = (id: string): Leaving | undefined => this.#leaving.get(id)?.what;

  /** Whether it serves, and is not about to end that. */
  awake(instance: Instance): boolean {
    return instance.state === "Running" && !this.#leaving.has(instance.id);
  }

  /**
   * The last guard of a standby or stop: from here on connections come to the listener.
   *
   * @throws {CommandError} where the kernel refuses; then the instance stays as it is
   */
  async leave({ instance, signal }: GuardContext, what: Leaving): Promise<void> {
    const { id } = instance;
    if (instance.state !== "Running") return;
    this.#stay(id);
    this.#leaving.set(id, { what, timer: undefined });
    const stays = () => this.#stay(id);
    // Overtaken: what comes next may find nothing to do and so tell nobody.
    signal.addEventListener("abort", stays, { once: true });
    try {
      this.#refresh(instance);
      await this.#options.elements?.flush();
      signal.throwIfAborted();
    } catch (error) {
      this.#stay(id);
      throw error;
    }
    // The registry writes its row right after the last guard. Where it does not, nothing else would tell either.
    const left = this.#leaving.get(id);
    if (left) left.timer = setTimeout(stays, SETTLE_MS);
  }

  follow({ instance, to }: LifecycleEvent): void {
    const { claims, elements, readiness, queues } = this.#options;
    const { id } = instance;
    clearTimeout(this.#leaving.get(id)?.timer);
    this.#leaving.delete(id);
    const serves = to === "Running" || to === "Paused" || to === "Unknown" || (to === "Standby" && queues(instance));
    if (!serves) readiness.forget(id);
    const ports = to === null ? [] : policyOf(instance).ports.map(({ host_port }) => host_port);
    for (const port of this.#ports.get(id) ?? []) {
      if (!ports.includes(port) && claims.port(port) === undefined) elements?.set(port, undefined);
    }
    if (ports.length === 0) this.#ports.delete(id);
    else this.#ports.set(id, ports);
    if (to === null) return elements?.flushLater();
    if (to === "Running") this.#probe(instance);
    this.#refresh(instance);
    elements?.flushLater();
  }

  /**
   * All of them anew, as the host starts or after events were missed: what runs, has run for a while.
   *
   * @throws {CommandError} where the kernel refuses
   */
  async rebuild(instances: readonly Instance[]): Promise<void> {
    const { claims, elements, readiness, queues } = this.#options;
    for (const port of [...this.#ports.values()].flat()) {
      if (claims.port(port) === undefined) elements?.set(port, undefined);
    }
    this.#ports.clear();
    const serving: Instance[] = [];
    for (const instance of instances) {
      const policy = policyOf(instance);
      if (policy.ports.length > 0) this.#ports.set(instance.id, policy.ports.map(({ host_port }) => host_port));
      if (instance.state === "Running" || (instance.state === "Standby" && queues(instance))) {
        for (const port of guestPortsOf(policy)) readiness.settle(instance.id, port);
        serving.push(instance);
      }
      this.#refresh(instance);
    }
    await elements?.flush();
    void this.#look6(serving);
  }

  /** Finds out, as time allows, which of them answer by IPv6 too. A probe wakes nobody, and a sleeping kernel answers it. */
  async #look6(instances: Instance[]): Promise<void> {
    await pooled(LOOKS, instances, async (instance) => {
      for (const { guest_port } of policyOf(instance).ports) {
        const probe = this.probeOf(instance, guest_port);
        if (probe && await this.#options.readiness.look6(instance.id, probe)) this.#again(instance.id);
      }
    });
  }

  probeOf(instance: Instance, port: number): Probe | undefined {
    const host = this.#options.addressOf(instance);
    if (host === null) return undefined;
    const policy = policyOf(instance);
    const passes = policy.ready === "health" ? this.#options.passes(instance) : undefined;
    const host6 = this.#options.elements ? instance.network.ip6 ?? null : null;
    return { host, host6, port, timeout: timeoutOf(policy), ...(passes && { passes }) };
  }

  [Symbol.dispose](): void {
    for (const { timer } of this.#leaving.values()) clearTimeout(timer);
  }

  // An instance that begins to serve is given to the kernel once its port answers: until then connections are held.
  #probe(instance: Instance): void {
    const { elements, readiness } = this.#options;
    if (!elements) return;
    for (const { guest_port } of policyOf(instance).ports) {
      const probe = this.probeOf(instance, guest_port);
      if (!probe || readiness.isSettled(instance.id, guest_port)) continue;
      void readiness.wait(instance.id, probe).then(() => this.#again(instance.id));
    }
  }

  #again(id: string): void {
    const now = this.#options.find(id);
    if (now) this.#refresh(now);
    this.#options.elements?.flushLater();
  }

  #stay(id: string): void {
    const left = this.#leaving.get(id);
    if (!left) return;
    clearTimeout(left.timer);
    this.#leaving.delete(id);
    this.#again(id);
  }

  #refresh(instance: Instance): void {
    const { claims, elements, readiness, addressOf } = this.#options;
    const ip = addressOf(instance);
    if (!elements || ip === null) return;
    for (const { host_port, guest_port } of policyOf(instance).ports) {
      if (claims.port(host_port)?.instance_id !== instance.id) continue;
      // Many programs listen on IPv4 only: then the listener, which takes both, leads clients there.
      const ip6 = readiness.answersBy6(instance.id, guest_port) ? instance.network.ip6 : null;
      const direct = this.#isDirect(instance, guest_port);
      if (direct !== null) elements.set(host_port, direct ? { ip, ip6, port: guest_port } : undefined);
    }
  }

  /** Null where it is to stay as it is. */
  #isDirect(instance: Instance, guest_port: number): boolean | null {
    const { readiness, queues } = this.#options;
    switch (instance.state) {
      case "Running": {
        const leaving = this.leaving(instance.id);
        const serves = leaving === undefined || (leaving === "standby" && queues(instance));
        return serves && readiness.isSettled(instance.id, guest_port);
      }
      case "Paused": // by a person, or on the way into or out of a sleep
        return instance.transition === null ? null : queues(instance) && readiness.isSettled(instance.id, guest_port);
      case "Standby":
        return queues(instance);
      case "Unknown":
        return null;
      case "Created":
      case "Initializing":
      case "Shutdown":
      case "Stopped":
        return false;
    }
  }
}
