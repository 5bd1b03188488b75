import { Buffer } from "node:buffer";

/** What a program or library asks to be there when it is started. */
export interface ElfNeeds {
  /** The program that loads it, `/lib64/ld-linux-x86-64.so.2`; null for libraries and static programs. */
  readonly interpreter: string | null;
  /** Names of libraries, `libc.so.6`. */
  readonly libraries: readonly string[];
}

// Of elf(5).
const [PT_LOAD, PT_DYNAMIC, PT_INTERP] = [1, 2, 3];
const [DT_NULL, DT_NEEDED, DT_STRTAB] = [0, 1, 5];

/**
 * Reads what a 64-bit little-endian ELF file needs. `ldd` would look for it on this machine, and run the file.
 *
 * @throws {RangeError} where it is no such file, or is cut off
 */
export function elfNeeds(file: Uint8Array): ElfNeeds {
  const bytes = Buffer.from(file.buffer, file.byteOffset, file.byteLength);
  // The magic number, then class 2 (64 bits) and data 1 (little-endian).
  if (bytes.toString("latin1", 0, 6) !== "\x7fELF\x02\x01") throw new RangeError("It is no 64-bit ELF file");
  const at = (offset: number) => Number(bytes.readBigUInt64LE(offset));
  const text = (offset: number) => bytes.toString("latin1", offset, bytes.indexOf(0, offset));
  const [table, size, count] = [at(32), bytes.readUInt16LE(54), bytes.readUInt16LE(56)];
  const segments = Array.from({ length: count }, (_, index) => {
    const start = table + index * size;
    return { type: bytes.readUInt32LE(start), offset: at(start + 8), address: at(start + 16), size: at(start + 32) };
  });
  const interp = segments.find(({ type }) => type === PT_INTERP);
  const interpreter = interp ? text(interp.offset) : null;
  const dynamic = segments.find(({ type }) => type === PT_DYNAMIC);
  if (!dynamic) return { interpreter, libraries: [] };
  const tags: [number, number][] = [];
  for (let offset = dynamic.offset; at(offset) !== DT_NULL; offset += 16) tags.push([at(offset), at(offset + 8)]);
  const strings = tags.find(([tag]) => tag === DT_STRTAB)?.[1] ?? 0;
  // The table of strings is given by where it is in memory.
  const home = segments.find(({ type, address, size }) =>
    type === PT_LOAD && strings >= address && strings < address + size
  );
  if (!home) throw new RangeError("It has no table of strings");
  const names = strings - home.address + home.offset;
  return { interpreter, libraries: tags.filter(([tag]) => tag === DT_NEEDED).map(([, name]) => text(names + name)) };
}
