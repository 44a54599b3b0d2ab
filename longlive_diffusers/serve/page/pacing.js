// When the video runs, and when it waits. No DOM in here.
//
// Frames come in bursts, a chunk at a time, and are shown at the video's own rate. Where none is left the viewer waits,
// and that is counted as a stall. Nothing is skipped to catch up: the video goes on with the next frame, so a stall
// makes it later and never leaves a gap.

const FIRST_LEAD = 0.1; // seconds that are there before the video begins; more would only make the first wait longer
const LEAD = 0.5; // and before it goes on after a stall, so that it does not stutter on single frames

/**
 * Seconds that must be there before a video that waits goes on.
 *
 * Never more than the chunk that is coming: the server makes few chunks beyond the frame that is seen, and waiting for
 * more than it will make would be forever.
 */
export function neededLead(hasBegun, chunkSeconds) {
  return Math.min(hasBegun ? LEAD : FIRST_LEAD, chunkSeconds);
}

/** Decides whether the video runs, and counts how often and how long it could not. Times are in seconds. */
export class Pacing {
  state = "waiting"; // or "playing", "held" (by the viewer) or "ended"
  stalls = 0;
  #stalled = 0; // seconds of the stalls that are over
  #since = null; // when the present one began
  #hasBegun = false;
  #frame;

  constructor(fps) {
    this.#frame = 1 / fps;
  }

  /**
   * @param now The time.
   * @param ahead Seconds of video that are there beyond the position.
   * @param chunkSeconds The length of the chunk that came last.
   * @param complete Whether nothing will follow.
   * @param held Whether the viewer wants it to stand still: such a time is no stall.
   * @param starved Whether the player says itself that it has run out.
   */
  update(now, { ahead, chunkSeconds, complete, held, starved = false }) {
    const state = this.#next({ ahead, chunkSeconds, complete, held, starved });
    if (state === "waiting" && this.#hasBegun && this.#since === null) {
      this.stalls += 1;
      this.#since = now;
    } else if (state !== "waiting" && this.#since !== null) {
      this.#stalled += now - this.#since;
      this.#since = null;
    }
    this.#hasBegun ||= state === "playing";
    this.state = state;
    return state;
  }

  /** Seconds that the viewer has waited since the video began, with the stall that is going on. */
  stalledSeconds(now) {
    return this.#stalled + (this.#since === null ? 0 : now - this.#since);
  }

  #next({ ahead, chunkSeconds, complete, held, starved }) {
    const isEmpty = ahead < this.#frame / 20; // a tenth of a frame would already round to the next one
    if (complete && (isEmpty || (starved && ahead < this.#frame))) return "ended";
    if (held) return "held";
    if (this.state === "playing") return isEmpty || (starved && ahead < this.#frame) ? "waiting" : "playing";
    const lead = complete ? 0 : neededLead(this.#hasBegun, chunkSeconds);
    return !isEmpty && ahead >= lead - this.#frame ? "playing" : "waiting";
  }
}
