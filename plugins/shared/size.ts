const POWERS = ["B", "KB", "MB", "GB", "TB", "PB"];
const SIZE = /^(\d+(?:\.\d+)?) ?(?:([KMGTP]?)(?:i?B)?)$/i;

/**
 * Bytes of a size such as `512MB`, `1.5G` or `1048576`; units are powers of 1024, as in the HTTP contract. `undefined`
 * for anything else and for what is no whole number of bytes.
 */
export function parseSize(text: string): number | undefined {
  const match = SIZE.exec(text.trim());
  if (!match) return undefined;
  const power = match[2] ? POWERS.indexOf(`${match[2].toUpperCase()}B`) : 0;
  const bytes = Number(match[1]) * 1024 ** power;
  return Number.isSafeInteger(bytes) ? bytes : undefined;
}

/** Bytes in the largest unit that holds them whole: `1GB`, `1536MB`, `1000B`. */
export function formatSize(bytes: number): string {
  let power = 0;
  while (bytes !== 0 && bytes % 1024 === 0 && power < POWERS.length - 1) {
    bytes /= 1024;
    power++;
  }
  return `${bytes}${POWERS[power]}`;
}
