/** Netlink sockets by libc, through Deno's foreign function interface. The layouts are those of 64-bit Linux. */
import { constants } from "node:os";

const SYMBOLS = {
  socket: { parameters: ["i32", "i32", "i32"], result: "i32" },
  bind: { parameters: ["i32", "buffer", "u32"], result: "i32" },
  setsockopt: { parameters: ["i32", "i32", "i32", "buffer", "u32"], result: "i32" },
  getsockopt: { parameters: ["i32", "i32", "i32", "buffer", "buffer"], result: "i32" },
  send: { parameters: ["i32", "buffer", "usize", "i32"], result: "isize" },
  recvmmsg: { parameters: ["i32", "buffer", "u32", "i32", "pointer"], result: "i32" },
  eventfd: { parameters: ["u32", "i32"], result: "i32" },
  read: { parameters: ["i32", "buffer", "usize"], result: "isize" },
  write: { parameters: ["i32", "buffer", "usize"], result: "isize" },
  close: { parameters: ["i32"], result: "i32" },
  // In a thread of the runtime: to wait, and for a dump, of which the kernel makes each part within the call.
  poll: { parameters: ["buffer", "u64", "i32"], result: "i32", nonblocking: true },
  sendAside: { name: "send", parameters: ["i32", "buffer", "usize", "i32"], result: "isize", nonblocking: true },
  recvmmsgAside: {
    name: "recvmmsg",
    parameters: ["i32", "buffer", "u32", "i32", "pointer"],
    result: "i32",
    nonblocking: true,
  },
  __errno_location: { parameters: [], result: "pointer" },
} as const satisfies Deno.ForeignLibraryInterface;

const AF_NETLINK = 16, SOCK_RAW = 3, NETLINK_NETFILTER = 12;
const CLOSE_ON_EXEC = 0o2000000, NONBLOCKING = 0o4000; // of sockets and of eventfds
const SOL_SOCKET = 1, SO_RCVBUF = 8, SO_RCVBUFFORCE = 33, SO_MEMINFO = 55;
/** Of the numbers that SO_MEMINFO gives, the last: SK_MEMINFO_DROPS. */
const MEMINFO = 9;
const POLLIN = 1;
const MSG_TRUNC = 0x20;
const SOCKADDR = 12, POLLFD = 8, IOVEC = 16, MMSGHDR = 64; // bytes of the structs
const { EAGAIN, EINTR, ENOBUFS } = constants.errno;

type Libc = Deno.DynamicLibrary<typeof SYMBOLS>["symbols"];
// Never closed: a poll may be waiting in it.
let loaded: Libc | undefined;

/** @throws {Error} where there is no FFI, no permission for it, or no libc of that name */
export function libc(): Libc {
  if (loaded) return loaded;
  if (!("Deno" in globalThis)) throw new Error("this runtime has no FFI");
  // Asked first: to call without would prompt on a terminal, and wait.
  if (Deno.permissions.querySync({ name: "ffi" }).state !== "granted") throw new Error("FFI is not allowed");
  return loaded = Deno.dlopen("libc.so.6", SYMBOLS).symbols;
}

/** A libc call that failed. */
export class SystemError extends Error {
  override readonly name = "SystemError";
  readonly errno: number;
  constructor(call: string, errno: number) {
    super(`${call}: ${errnoName(errno)}`);
    this.errno = errno;
  }
}

/** `ENOBUFS` of 105. */
export function errnoName(errno: number): string {
  return Object.entries(constants.errno).find(([, number]) => number === errno)?.[0] ?? `errno ${errno}`;
}

function checked(call: string, result: number | bigint): number {
  // Read at once: the next libc call of this thread may write another.
  if (result < 0) throw new SystemError(call, new Deno.UnsafePointerView(loaded!.__errno_location()!).getInt32());
  return Number(result);
}

export interface SocketOptions {
  /** A bit for each multicast group to hear. */
  groups: number;
  /** Datagrams that one call receives, and the bytes that each may have. */
  slots: number;
  slotSize: number;
  /** Bytes to ask of the kernel; its own default when absent. */
  receiveBuffer?: number;
}

/** A non-blocking socket to netfilter. */
export class NetlinkSocket implements Disposable {
  readonly #libc = libc();
  readonly #descriptor: number;
  readonly #slots: number;
  readonly #slotSize: number;
  /** Where datagrams are received: one every `slotSize` bytes. */
  readonly bytes: Uint8Array<ArrayBuffer>;
  // The kernel finds these by address only: they must be as reachable as the socket.
  readonly #headers: Uint8Array<ArrayBuffer>;
  readonly #vectors: BigUint64Array<ArrayBuffer>;
  readonly #view: DataView;

  /** @throws {SystemError} */
  constructor({ groups, slots, slotSize, receiveBuffer }: SocketOptions) {
    this.#slots = slots;
    this.#slotSize = slotSize;
    this.bytes = new Uint8Array(slots * slotSize);
    this.#headers = new Uint8Array(slots * MMSGHDR);
    this.#vectors = new BigUint64Array(slots * IOVEC / 8);
    this.#view = new DataView(this.#headers.buffer);
    const [data, vectors] = [addressOf(this.bytes), addressOf(this.#vectors)];
    for (let slot = 0; slot < slots; slot++) {
      this.#vectors[2 * slot] = data + BigInt(slot * slotSize);
      this.#vectors[2 * slot + 1] = BigInt(slotSize);
      this.#view.setBigUint64(slot * MMSGHDR + 16, vectors + BigInt(slot * IOVEC), true); // msg_iov
      this.#view.setBigUint64(slot * MMSGHDR + 24, 1n, true); // msg_iovlen
    }
    const type = SOCK_RAW | CLOSE_ON_EXEC | NONBLOCKING;
    this.#descriptor = checked("socket", this.#libc.socket(AF_NETLINK, type, NETLINK_NETFILTER));
    try {
      // Before it hears anything: the first burst may be the largest.
      if (receiveBuffer !== undefined) this.#grow(receiveBuffer);
      const address = new Uint8Array(SOCKADDR);
      const view = new DataView(address.buffer);
      view.setUint16(0, AF_NETLINK, true);
      view.setUint32(8, groups, true);
      checked("bind", this.#libc.bind(this.#descriptor, address, SOCKADDR));
    } catch (error) {
      this[Symbol.dispose]();
      throw error;
    }
  }

  /** FORCE goes beyond `net.core.rmem_max`, and needs CAP_NET_ADMIN; without it, as much as may be. */
  #grow(bytes: number): void {
    const value = new Uint8Array(new Uint32Array([bytes]).buffer);
    const set = (option: number) => this.#libc.setsockopt(this.#descriptor, SOL_SOCKET, option, value, 4);
    if (set(SO_RCVBUFFORCE) < 0) checked("setsockopt", set(SO_RCVBUF));
  }

  /** What the kernel gave: twice what was asked, for its own bookkeeping counts too. */
  get receiveBuffer(): number {
    return this.#option(SO_RCVBUF, 1)[0];
  }

  /** Messages that the kernel dropped because the buffer was full. */
  get dropped(): number {
    return this.#option(SO_MEMINFO, MEMINFO)[MEMINFO - 1];
  }

  #option(option: number, numbers: number): Uint32Array {
    const value = new Uint32Array(numbers);
    const bytes = new Uint8Array(value.buffer);
    const size = new Uint8Array(new Uint32Array([bytes.length]).buffer);
    checked("getsockopt", this.#libc.getsockopt(this.#descriptor, SOL_SOCKET, option, bytes, size));
    return value;
  }

  /** @throws {SystemError} */
  send(bytes: Uint8Array<ArrayBuffer>): void {
    checked("send", this.#libc.send(this.#descriptor, bytes, BigInt(bytes.length), 0));
  }

  /** The number of datagrams it received, 0 where none waits. @throws {SystemError} ENOBUFS once any was dropped */
  receive(): number {
    try {
      return checked("recvmmsg", this.#libc.recvmmsg(this.#descriptor, this.#headers, this.#slots, 0, null));
    } catch (error) {
      if (!(error instanceof SystemError) || (error.errno !== EAGAIN && error.errno !== EINTR)) throw error;
      // The runtime's own calls write to errno too, and an overflow is told only once.
      if (this.dropped > 0) throw new SystemError("recvmmsg", ENOBUFS);
      return 0;
    }
  }

  /** The same off this thread. It must not be closed before. @throws {SystemError} */
  async sendAside(bytes: Uint8Array<ArrayBuffer>): Promise<void> {
    const sent = await this.#libc.sendAside(this.#descriptor, bytes, BigInt(bytes.length), 0);
    // What went wrong is known only to that thread: it will go wrong here too.
    if (sent < 0) this.send(bytes);
  }

  /** The same off this thread. It must not be closed before, nor received from. @throws {SystemError} */
  async receiveAside(): Promise<number> {
    const count = await this.#libc.recvmmsgAside(this.#descriptor, this.#headers, this.#slots, 0, null);
    return count < 0 ? this.receive() : count;
  }

  /** The bytes of a received datagram; what did not fit in its slot is lost. */
  length(slot: number): number {
    return Math.min(this.#view.getUint32(slot * MMSGHDR + 56, true), this.#slotSize);
  }

  /** Whether a received datagram did not fit. */
  truncated(slot: number): boolean {
    return (this.#view.getInt32(slot * MMSGHDR + 48, true) & MSG_TRUNC) !== 0;
  }

  /** Resolves when there is something to receive, or `waker` wakes. It must not be closed before. */
  async readable(waker: Waker): Promise<void> {
    const polled = new Uint8Array(2 * POLLFD);
    const view = new DataView(polled.buffer);
    [this.#descriptor, waker.descriptor].forEach((descriptor, index) => {
      view.setInt32(index * POLLFD, descriptor, true);
      view.setInt16(index * POLLFD + 4, POLLIN, true);
    });
    await this.#libc.poll(polled, 2n, -1);
    // Keeps the struct reachable while a thread writes to it.
    view.getInt16(6, true);
  }

  [Symbol.dispose](): void {
    this.#libc.close(this.#descriptor);
  }
}

/** Ends a {@linkcode NetlinkSocket.readable} from outside. */
export class Waker implements Disposable {
  readonly #libc = libc();
  readonly descriptor = checked("eventfd", this.#libc.eventfd(0, CLOSE_ON_EXEC | NONBLOCKING));

  /** Every wait from here on returns at once, until it is cleared. */
  wake(): void {
    checked("write", this.#libc.write(this.descriptor, new Uint8Array(new BigUint64Array([1n]).buffer), 8n));
  }

  clear(): void {
    // Fails where nobody woke, which is as good.
    this.#libc.read(this.descriptor, new Uint8Array(8), 8n);
  }

  [Symbol.dispose](): void {
    this.#libc.close(this.descriptor);
  }
}

function addressOf(buffer: Uint8Array<ArrayBuffer> | BigUint64Array<ArrayBuffer>): bigint {
  return Deno.UnsafePointer.value(Deno.UnsafePointer.of(buffer));
}
