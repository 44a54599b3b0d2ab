// Draws JPEG pictures on a <canvas>, where there are no Media Source Extensions, or exact pictures are wanted.
//
// It has a clock of its own, which never passes a frame that is not drawn yet. So no frame is left out: on a slow
// machine the video becomes slower, and the rate that is shown says so.

const DECODE_AHEAD = 4; // frames

/**
 * Where the position is after `elapsed` seconds: at most at the frame after the one that is drawn, and at the end of
 * what is there.
 */
export function advance(position, elapsed, { drawn, available, fps }) {
  return Math.min(position + elapsed, (drawn + 2) / fps - 1e-6, available / fps);
}

export class JpegPlayer {
  #canvas;
  #fps;
  #recording;
  #live = new Map(); // index -> buffer of a frame that was not seen yet
  #decoded = new Map(); // index -> a promise of its picture
  #received = 0;
  #drawn = -1;
  #isDrawing = false;
  #position = 0;
  #ticked = null; // when, while it runs
  #generation = 0; // of seeks: what was begun before the last one is not drawn any more
  shown = 0;
  starved = false; // the position says it all

  /** @param recording Where frames that were seen already are taken from. */
  constructor(canvas, { fps, width, height }, handlers, recording) {
    this.#canvas = canvas;
    canvas.width = width;
    canvas.height = height;
    this.#fps = fps;
    this.handlers = handlers;
    this.#recording = recording;
  }

  append(buffer) {
    this.#live.set(this.#received, buffer);
    this.#received += 1;
    this.#draw();
  }

  finish() {}

  run(runs) {
    if (!runs) {
      this.#ticked = null;
      return;
    }
    const now = performance.now() / 1000;
    if (this.#ticked !== null) {
      const limits = { drawn: this.#drawn, available: this.#received, fps: this.#fps };
      this.#position = advance(this.#position, now - this.#ticked, limits);
      this.#leap();
      this.#draw();
    }
    this.#ticked = now;
  }

  get position() {
    return this.#position;
  }

  get frame() {
    return this.#drawn;
  }

  get ahead() {
    return Math.max(0, this.#received / this.#fps - this.#position);
  }

  get ranges() {
    const [kept, live, end] = [this.#recording.length, this.#firstLive, this.#received];
    const ranges = live <= kept ? [[0, end]] : [[0, kept], [live, end]];
    return ranges.filter(([from, to]) => from < to).map((range) => range.map((frame) => frame / this.#fps));
  }

  seek(seconds) {
    this.#position = seconds;
    this.#generation += 1;
    this.#drawn = -1 + Math.floor(seconds * this.#fps + 1e-3); // the clock may go on from there
    this.#forget(() => true);
    this.#draw();
  }

  close() {
    this.#generation += 1;
    this.#forget(() => true);
    this.#live.clear();
  }

  /** The first frame that was not seen yet. */
  get #firstLive() {
    const [first = this.#received] = this.#live.keys();
    return first;
  }

  /** Whether a frame is there, or is to come: those that were seen after the recording was full are not kept. */
  #isThere(index) {
    return index < this.#recording.length || index >= this.#firstLive;
  }

  /** Go on with frames that are there. */
  #leap() {
    const index = Math.floor(this.#position * this.#fps + 1e-3);
    if (index === this.#drawn || this.#isThere(index)) return;
    this.#position = this.#firstLive / this.#fps;
    this.#drawn = this.#firstLive - 1; // the clock may go on from there
  }

  /** Draw the frame of the position, unless it is there already. */
  async #draw() {
    const index = Math.min(Math.floor(this.#position * this.#fps + 1e-3), this.#received - 1);
    if (this.#isDrawing || index === this.#drawn || index < 0) return;
    this.#isDrawing = true;
    const generation = this.#generation;
    try {
      const ahead = Math.min(index + DECODE_AHEAD, this.#received);
      for (let next = index; next < ahead; next += 1) if (this.#isThere(next)) this.#decode(next);
      const picture = await this.#decode(index);
      if (generation === this.#generation) this.#show(picture, index);
    } catch {
      // Browsers have names of their own for a picture that cannot be decoded.
      if (generation === this.#generation) this.handlers.failed(`frame ${index} is no picture`);
    } finally {
      this.#isDrawing = false;
    }
    if (generation !== this.#generation) this.#draw();
  }

  #show(picture, index) {
    this.#canvas.getContext("2d").drawImage(picture, 0, 0, this.#canvas.width, this.#canvas.height);
    this.#drawn = index;
    this.shown += 1;
    if (this.shown === 1) this.handlers.first();
    this.#forget((other) => other <= index);
    for (const seen of this.#live.keys()) if (seen <= index) this.#live.delete(seen);
  }

  #decode(index) {
    if (!this.#decoded.has(index)) {
      const data = this.#live.get(index);
      const blob = data ? new Blob([data], { type: "image/jpeg" }) : this.#recording.message(index, "image/jpeg");
      const picture = createImageBitmap(blob);
      picture.catch(() => {}); // whoever draws it says so
      this.#decoded.set(index, picture);
    }
    return this.#decoded.get(index);
  }

  #forget(which) {
    for (const [index, picture] of this.#decoded) {
      if (!which(index)) continue;
      this.#decoded.delete(index);
      picture.then((bitmap) => bitmap.close(), () => {});
    }
  }
}
