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

  /** Keep one message; says whether it is kept. */
  add(buffer) {
    this.isFull ||= this.bytes + buffer.byteLength > LIMIT;
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

  get length() {
    return this.#starts.length;
  }

  /** One message, or all of them joined. */
  message(index, type) {
    return this.blob(type).slice(this.#starts[index], this.#starts[index + 1] ?? this.bytes, type);
  }

  blob(type) {
    return new Blob([this.#sealed, ...this.#open], { type });
  }
}
