import type { Hypervisor, Instance, Network } from "../../main.ts";

/** Where instances are reached from this process. */
export class Reach {
  readonly #hypervisor: Hypervisor;
  readonly #network: boolean;

  constructor(hypervisor: Hypervisor, network: Network | undefined) {
    this.#hypervisor = hypervisor;
    this.#network = network?.enabled ?? false;
  }

  /** Whether it can be reached at all. */
  has({ driver, network }: Pick<Instance, "driver" | "network">): boolean {
    return this.#network ? network.enabled : this.#shares(driver);
  }

  /** Its own address, or that of this machine where it shares the machine's network; null where it has none. */
  addressOf({ driver, network }: Pick<Instance, "driver" | "network">): string | null {
    if (this.#network) return network.ip;
    return this.#shares(driver) ? "127.0.0.1" : null;
  }

  #shares(driver: string): boolean {
    // That there is no such driver is for others to say.
    return this.#hypervisor.drivers().find(({ name }) => name === driver)?.features.has("host-network") ?? true;
  }
}
