// Plays fragments of an mp4 in a <video>, by Media Source Extensions.
//
// Fragments carry their own times, so nothing drifts: a stall only makes the element wait. What is far behind the
// position is removed from the SourceBuffer, or an endless stream would fill the memory.

const KEEP_BYTES = 64 * 2 ** 20; // behind the position; browsers allow 100 MB and more
const KEEP_SECONDS = 10; // of that, whatever they weigh
const FRAME_TOLERANCE = 1e-3; // of a frame: a time may be a rounding error before the frame that it is of

// iPhones only have the managed one.
const Source = globalThis.MediaSource ?? globalThis.ManagedMediaSource;

export function canPlay(mime) {
  return Source !== undefined && Source.isTypeSupported(mime);
}

/** What to remove: up to where, in seconds, or null. All is in seconds and bytes. */
export function removalEnd({ start, position, bytesPerSecond }, keepBytes = KEEP_BYTES) {
  const end = position - Math.max(KEEP_SECONDS, keepBytes / bytesPerSecond);
  return end - start > KEEP_SECONDS ? end : null; // in pieces, for each removal costs
}

export class MsePlayer {
  #video;
  #fps;
  #source = new Source();
  #buffer = null;
  #url;
  #queue = []; // what is still to be appended
  #keepBytes = KEEP_BYTES;
  #bytes = 0;
  #received = 0; // frames
  #isComplete = false;
  #isClosed = false;
  #runs = false;

  /** @param handlers `first()`, with the first picture; `failed(message)`; `blocked()`, by the browser's settings */
  constructor(video, { mime, fps }, handlers) {
    this.#video = video;
    this.#fps = fps;
    this.handlers = handlers;
    this.#source.addEventListener("sourceopen", () => {
      if (this.#buffer || this.#isClosed) return;
      if (!canPlay(mime)) return handlers.failed(`${mime} is not supported`);
      this.#buffer = this.#source.addSourceBuffer(mime);
      this.#buffer.addEventListener("updateend", () => this.#work());
      this.#work();
    });
    video.onloadeddata = () => this.#sayFirst();
    video.onerror = () => this.#fail();
    video.disableRemotePlayback = true; // or a ManagedMediaSource does not open
    this.#url = URL.createObjectURL(this.#source);
    video.src = this.#url;
  }

  append(buffer) {
    this.#queue.push(buffer);
    this.#bytes += buffer.byteLength;
    this.#received += 1;
    this.#work();
  }

  /** No frame follows. */
  finish() {
    this.#isComplete = true;
    this.#work();
  }

  run(runs) {
    if (runs === this.#runs && runs === !this.#video.paused) return;
    this.#runs = runs;
    if (!runs) return this.#video.pause();
    this.#video.play().catch((error) => {
      // AbortError: it was paused again before it began, which is nothing.
      if (error.name === "NotAllowedError") this.handlers.blocked();
    });
  }

  get position() {
    return this.#video.currentTime;
  }

  /** The index of the frame on the screen, or -1. */
  get frame() {
    if (this.#video.readyState < HTMLMediaElement.HAVE_CURRENT_DATA) return -1;
    return Math.min(Math.floor(this.#video.currentTime * this.#fps + FRAME_TOLERANCE), this.#received - 1);
  }

  get ahead() {
    const { currentTime } = this.#video;
    const range = this.ranges.find(([start, end]) => start - 0.1 <= currentTime && currentTime <= end + 0.1);
    return range ? Math.max(0, range[1] - currentTime) : 0;
  }

  get starved() {
    return this.#video.readyState < HTMLMediaElement.HAVE_FUTURE_DATA;
  }

  /** What can be shown: [start, end] in seconds. */
  get ranges() {
    const { buffered } = this.#video;
    return Array.from({ length: buffered.length }, (_, index) => [buffered.start(index), buffered.end(index)]);
  }

  get shown() {
    const quality = this.#video.getVideoPlaybackQuality();
    return quality.totalVideoFrames - quality.droppedVideoFrames;
  }

  seek(seconds) {
    this.#video.currentTime = seconds;
  }

  close() {
    this.#isClosed = true;
    this.#video.onloadeddata = this.#video.onerror = null;
    this.#video.removeAttribute("src");
    this.#video.load();
    URL.revokeObjectURL(this.#url);
  }

  #sayFirst() {
    this.#video.onloadeddata = null;
    // The data is there; the picture is when the browser has composed it.
    const { first } = this.handlers;
    if ("requestVideoFrameCallback" in this.#video) this.#video.requestVideoFrameCallback(() => first());
    else first();
  }

  #work() {
    if (!this.#buffer || this.#buffer.updating || this.#isClosed || this.#video.error) return;
    if (this.#source.readyState === "closed") return;
    if (this.#removeOld() || this.#appendQueue()) return;
    if (this.#isComplete && this.#source.readyState === "open") this.#source.endOfStream();
  }

  #removeOld() {
    const [first] = this.ranges;
    if (!first || (this.#isComplete && this.#queue.length === 0)) return false; // a video that is over stays whole
    const received = this.#received / this.#fps;
    const bytesPerSecond = this.#bytes / received;
    const position = this.#video.currentTime;
    const end = removalEnd({ start: first[0], position, bytesPerSecond }, this.#keepBytes);
    if (end === null) return false;
    this.#buffer.remove(0, end);
    return true;
  }

  #appendQueue() {
    if (this.#queue.length === 0) return false;
    const joined = join(this.#queue);
    try {
      this.#buffer.appendBuffer(joined);
    } catch (error) {
      if (error.name !== "QuotaExceededError") throw error;
      // It holds less than was thought: keep less, and try again when some of it has been seen.
      this.#queue = [joined];
      this.#keepBytes /= 2;
      if (!this.#removeOld()) setTimeout(() => this.#work(), 500);
      return true;
    }
    this.#queue = [];
    return true;
  }

  #fail() {
    if (!this.#isClosed) this.handlers.failed(this.#video.error?.message ?? "");
  }
}

function join(buffers) {
  const joined = new Uint8Array(buffers.reduce((bytes, buffer) => bytes + buffer.byteLength, 0));
  let offset = 0;
  for (const buffer of buffers) {
    joined.set(new Uint8Array(buffer), offset);
    offset += buffer.byteLength;
  }
  return joined;
}
