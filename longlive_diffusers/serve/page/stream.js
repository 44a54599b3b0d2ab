// One video, from `started` until the next one: it is received, kept, and played at its own rate.

import { JpegPlayer } from "./player_jpeg.js";
import { MsePlayer } from "./player_mse.js";
import { Pacing } from "./pacing.js";
import { Recording } from "./recording.js";
import { Rate } from "./statistics.js";

export class Stream {
  recording = new Recording();
  received = 0; // frames
  made = new Rate();
  shown = new Rate();
  lastChunk = null;
  isComplete = false;
  isPaused = false; // by the viewer
  firstFrame = null; // seconds from the start message to the first picture
  promptLatency = null; // seconds from a prompt's message to its first frame on the screen

  #asked = null; // { kind, prompt, sent, frame } of the last change that is not on the screen yet
  #wasHeld = false;
  #player;
  #pacing;

  /**
   * @param started The server's message.
   * @param screen The <video> or the <canvas>.
   * @param sent When the start message was sent, in seconds.
   * @param handlers `failed(message)`, `blocked()`.
   */
  constructor(started, screen, sent, handlers) {
    this.started = started;
    this.#pacing = new Pacing(started.fps);
    const first = () => (this.firstFrame ??= seconds() - sent);
    const isJpeg = started.mime === "image/jpeg";
    this.#player = new (isJpeg ? JpegPlayer : MsePlayer)(screen, started, { ...handlers, first }, this.recording);
  }

  /** A change of the prompt was sent. */
  ask(kind, prompt) {
    this.#asked = { kind, prompt, sent: seconds(), frame: null };
    return this.#asked;
  }

  /** The change that was asked for, and has no chunk yet. */
  get pending() {
    return this.#asked?.frame === null ? this.#asked : null;
  }

  forgetPending() {
    if (this.pending) this.#asked = null;
  }

  /** A chunk was announced; its frames follow. */
  announce(chunk) {
    this.lastChunk = chunk;
  }

  /** What was asked for begins with this frame. */
  arrived(frame) {
    this.#asked.frame = frame;
  }

  take(buffer) {
    this.recording.add(buffer);
    this.received += 1;
    this.#player.append(buffer);
  }

  finish() {
    this.isComplete = true;
    this.#player.finish();
  }

  /** Go on or wait, as what is there allows; returns "waiting", "playing", "held" or "ended". */
  update(isVisible) {
    const now = seconds();
    const state = this.#pacing.update(now, {
      ahead: this.#player.ahead,
      chunkSeconds: (this.lastChunk?.num_frames ?? 0) / this.started.fps,
      complete: this.isComplete,
      held: this.isPaused || !isVisible,
      starved: this.#player.starved,
    });
    this.#player.run(state === "playing");
    if (this.#asked?.frame != null && this.frame >= this.#asked.frame) {
      this.promptLatency = now - this.#asked.sent;
      this.#asked = null;
    }
    return state;
  }

  /** Note how many frames were made and shown by now; a rate is of the time that the video runs. */
  measure() {
    const now = seconds();
    if (this.#pacing.state === "held") {
      this.#wasHeld = true;
      return;
    }
    if (this.#wasHeld) {
      this.made = new Rate();
      this.shown = new Rate();
      this.#wasHeld = false;
    }
    if (!this.isComplete) this.made.add(now, this.received);
    if (this.#pacing.state !== "ended") this.shown.add(now, this.#player.shown);
  }

  seek(to) {
    this.#player.seek(to);
  }

  get position() {
    return Math.min(this.#player.position, this.length);
  }

  get length() {
    return this.received / this.started.fps;
  }

  get frame() {
    return this.#player.frame;
  }

  get ahead() {
    return this.#player.ahead;
  }

  get ranges() {
    return this.#player.ranges;
  }

  /** When the first and the last frame of each range begin. */
  get frames() {
    return this.ranges.map(([start, end]) => [start, Math.max(start, end - 1 / this.started.fps)]);
  }

  get stalls() {
    return this.#pacing.stalls;
  }

  get stalledSeconds() {
    return this.#pacing.stalledSeconds(seconds());
  }

  close() {
    this.#player.close();
  }
}

export function seconds() {
  return performance.now() / 1000;
}
