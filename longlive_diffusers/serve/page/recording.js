// What was received, as it came: the download, and what is replayed.

const SEAL = 4 * 2 ** 20; // bytes; what is sealed into a Blob may leave the memory for the disk
const LIMIT = 2 ** 30; // bytes; the stream may be endless, and the disk is not

export class Recording {
  #sealed = new Blob([]);
  #open = []; // buffers that are not sealed yet
  #openBytes = 0;
  #starts = []; // the byte at which each message begins
  bytes = 0;
  isFull = false; // from then on nothing is kept any more: what is there stays a video that plays
  #limit;

  constructor(limit = LIMIT) {
    this.#limit = limit;
  }

  /** Keep one message; says whether it is kept. */
  add(buffer) {
    this.isFull ||= this.bytes + buffer.byteLength > this.#limit;
    if (this.isFull) return false;
    this.#starts.push(this.bytes);
    this.#open.push(buffer);
    this.#openBytes += buffer.byteLength;
    this.bytes += buffer.byteLength;
    if (this.#openBytes >= SEAL) {
      this.#sealed = new Blob([this.#sealed, ...this.#open]);
      this.#open = [];
      this.#openBytes = 0;
    }
    return true;
  }

  /** How many messages are kept. */
  get length() {
    return this.#starts.length;
  }

  /** One of the messages that are kept. */
  message(index, type) {
    if (!(index in this.#starts)) throw new RangeError(`message ${index} is not kept`);
    return this.blob(type).slice(this.#starts[index], this.#starts[index + 1] ?? this.bytes, type);
  }

  /** All of them, joined. */
  blob(type) {
    return new Blob([this.#sealed, ...this.#open], { type });
  }
}
