import ipaddr from "ipaddr.js";

/** Texts of sources that are remembered; a guest's clients are few, a scan's are many. */
const REMEMBERED = 4096;

/**
 * The addresses that flows are wanted for, found by the raw bytes of a message without making text of them. One set is
 * shared by who adds to it and the source that reads it, so a change holds from the next message on.
 */
export class WatchedAddresses {
  readonly #v4 = new Map<number, string>();
  readonly #v6 = new Map<string, string>();
  readonly #text = new Map<string, string>();

  /** @throws {Error} where one is no address */
  constructor(addresses: Iterable<string> = []) {
    for (const address of addresses) this.add(address);
  }

  get size(): number {
    return this.#v4.size + this.#v6.size;
  }

  /** Flows for it carry it in this spelling. @throws {Error} where it is no address */
  add(address: string): void {
    const parsed = ipaddr.parse(address);
    const view = new DataView(Uint8Array.from(parsed.toByteArray()).buffer);
    if (view.byteLength === 4) this.#v4.set(view.getUint32(0), address);
    else this.#v6.set(key6(view, 0), address);
    this.#text.set(parsed.toString(), address);
  }

  /** @throws {Error} where it is no address */
  delete(address: string): void {
    const parsed = ipaddr.parse(address);
    const view = new DataView(Uint8Array.from(parsed.toByteArray()).buffer);
    if (view.byteLength === 4) this.#v4.delete(view.getUint32(0));
    else this.#v6.delete(key6(view, 0));
    this.#text.delete(parsed.toString());
  }

  /** The watched address whose bytes are at `offset`, 4 or 16 of them by `family`. */
  at(view: DataView, offset: number, family: 4 | 6): string | undefined {
    if (family === 4) return this.#v4.get(view.getUint32(offset));
    return this.#v6.size === 0 ? undefined : this.#v6.get(key6(view, offset));
  }

  /** The watched address of a canonical text. */
  named(text: string): string | undefined {
    return this.#text.get(text);
  }
}

/** Makes text of the bytes of addresses, and remembers the last few thousand. */
export class AddressTexts {
  readonly #v4 = new Map<number, string>();
  readonly #v6 = new Map<string, string>();

  at(view: DataView, offset: number, family: 4 | 6): string {
    return family === 4
      ? remember(this.#v4, view.getUint32(offset), text4)
      : remember(this.#v6, key6(view, offset), text6);
  }
}

function remember<K>(known: Map<K, string>, key: K, make: (key: K) => string): string {
  let text = known.get(key);
  if (text === undefined) {
    if (known.size >= REMEMBERED) known.clear();
    known.set(key, text = make(key));
  }
  return text;
}

/** Two bytes to a character: the shortest text that is a key. */
function key6(view: DataView, offset: number): string {
  const part = (index: number) => view.getUint16(offset + 2 * index);
  return String.fromCharCode(part(0), part(1), part(2), part(3), part(4), part(5), part(6), part(7));
}

function text4(word: number): string {
  return `${word >>> 24}.${(word >>> 16) & 255}.${(word >>> 8) & 255}.${word & 255}`;
}

function text6(key: string): string {
  // By index: to iterate the text would take two parts that make a surrogate pair for one.
  const bytes = Array.from({ length: 16 }, (_, index) => {
    const part = key.charCodeAt(index >> 1);
    return index % 2 === 0 ? part >> 8 : part & 255;
  });
  return ipaddr.fromByteArray(bytes).toString();
}
