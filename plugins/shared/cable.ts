import { readFileSync } from "node:fs";

/** Bytes that an instance has received and sent since the host's end of its cable is there; 0 without one. */
export function cableBytes(device: string | null): { network_rx_bytes: number; network_tx_bytes: number } {
  // What the host's end sends is what the instance receives.
  return { network_rx_bytes: counter(device, "tx_bytes"), network_tx_bytes: counter(device, "rx_bytes") };
}

function counter(device: string | null, name: string): number {
  if (device === null) return 0;
  try {
    return Number(readFileSync(`/sys/class/net/${device}/statistics/${name}`, "latin1"));
  } catch (error) {
    // The last two of one that goes at this moment.
    if (["ENOENT", "ENODEV", "EINVAL"].includes((error as NodeJS.ErrnoException).code ?? "")) return 0;
    throw error;
  }
}
