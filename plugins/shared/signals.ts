import process from "node:process";

/**
 * Resolves with the name of the next signal that asks this process to end. Its listeners stay: who runs children (execa)
 * listens too, and ends the process by the signal where nobody else is left who does.
 */
export function nextSignal(): Promise<string> {
  return new Promise((resolve) => {
    for (const signal of ["SIGTERM", "SIGINT"] as const) process.on(signal, () => resolve(signal));
  });
}
