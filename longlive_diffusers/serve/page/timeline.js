// What was made, along time: one segment for each prompt of each shot. The first part has no DOM in it.

import { clock } from "./statistics.js";

const LEAST_SPAN = 8; // seconds that the whole track stands for at least, so that a short video is seen to grow

/** How a segment came to be, as it is written. */
export const KINDS = { start: "Start", prompt: "Prompt", cut: "New shot", blend: "Glide" };

/**
 * Add a chunk to the segments, each { kind, prompt, shot, start, end } in frames.
 *
 * @param asked What was asked for last, { kind, prompt }, or null: it tells a glide from another change of the prompt.
 * @returns The segment that it began, or null.
 */
export function addChunk(segments, chunk, asked = null) {
  const last = segments.at(-1);
  const end = chunk.start_frame + chunk.num_frames;
  if (last && last.shot === chunk.shot_index && last.prompt === chunk.prompt) {
    last.end = end;
    return null;
  }
  let kind = "start";
  if (last) kind = last.shot !== chunk.shot_index ? "cut" : asked?.kind === "blend" ? "blend" : "prompt";
  segments.push({ kind, prompt: chunk.prompt, shot: chunk.shot_index, start: chunk.start_frame, end });
  return segments.at(-1);
}

/** The seconds that the whole track stands for. */
export function span(seconds) {
  return Math.max(LEAST_SPAN, seconds);
}

/** Where each segment lies on the track: { left, width } as fractions of it. */
export function layout(segments, fps) {
  const whole = span((segments.at(-1)?.end ?? 0) / fps) * fps;
  return segments.map(({ start, end }) => ({ left: start / whole, width: (end - start) / whole }));
}

/** The index of the segment that shows a frame, or -1. */
export function segmentAt(segments, frame) {
  return segments.findLastIndex(({ start }) => start <= frame);
}

/** The nearest second that can be shown; `ranges` are [start, end]. Null where there is none. */
export function nearest(ranges, seconds) {
  const inside = ranges.map(([start, end]) => Math.min(Math.max(seconds, start), end));
  return inside.sort((a, b) => Math.abs(a - seconds) - Math.abs(b - seconds))[0] ?? null;
}

/** The track below the video, and the list of prompts beside it. */
export class Timeline {
  segments = [];
  #fps = 24;
  #seconds = 0; // received
  #position = 0;
  #current = -1; // the index of the segment that is seen
  #pending = null;
  #canSeek = false;

  /** @param seek Called with the seconds that the viewer wants to see. */
  constructor({ track, list, story, caption }, seek) {
    Object.assign(this, { track, list, story, caption, seek });
    this.bars = track.querySelector("#segments");
    track.addEventListener("pointerdown", (event) => this.#grab(event));
    track.addEventListener("pointermove", (event) => event.buttons === 1 && this.#point(event));
    track.addEventListener("keydown", (event) => this.#key(event));
  }

  begin(fps) {
    this.segments = [];
    this.#fps = fps;
    this.#current = -1;
    this.#pending = null;
    this.#seconds = this.#position = 0;
    this.bars.replaceChildren();
    this.list.replaceChildren();
    this.story.hidden = true;
    this.caption.textContent = "";
  }

  add(chunk, asked) {
    this.#seconds = (chunk.start_frame + chunk.num_frames) / this.#fps;
    const segment = addChunk(this.segments, chunk, asked);
    if (segment) this.#addToPage(segment);
    const places = layout(this.segments, this.#fps);
    for (const [index, { left, width }] of places.entries()) {
      this.bars.children[index].style.left = `${left * 100}%`;
      this.bars.children[index].style.width = `${width * 100}%`;
    }
    this.#showPosition();
    return segment;
  }

  /** Show what was asked for and is not there yet, or null. */
  setPending(asked) {
    this.#pending?.remove();
    this.#pending = null;
    if (!asked) return;
    this.#pending = this.#entry("next", KINDS[asked.kind], asked.prompt);
    this.#pending.classList.add("pending");
    this.#pending.firstChild.disabled = true;
    this.list.prepend(this.#pending);
  }

  /** Show the position, in seconds, and whether the viewer can choose another. */
  setPosition(position, canSeek) {
    this.#position = position;
    this.#canSeek = canSeek;
    this.#showPosition();
    const aria = {
      disabled: !canSeek,
      valuemax: this.#seconds.toFixed(1),
      valuenow: position.toFixed(1),
      valuetext: `${clock(position)} of ${clock(this.#seconds)}`,
    };
    for (const [name, value] of Object.entries(aria)) this.track.setAttribute(`aria-${name}`, value);
    this.#mark(segmentAt(this.segments, position * this.#fps + 1e-3)); // a rounding error before it is the frame, too
  }

  #showPosition() {
    const playhead = this.track.querySelector("#playhead");
    playhead.hidden = this.segments.length === 0;
    playhead.style.left = `${(this.#position / span(this.#seconds)) * 100}%`;
    for (const [index, { start, end }] of this.segments.entries()) {
      const seen = (this.#position * this.#fps - start) / (end - start);
      this.bars.children[index].style.setProperty("--seen", `${Math.min(Math.max(0, seen), 1) * 100}%`);
    }
  }

  #mark(index) {
    if (index === this.#current) return;
    this.#current = index;
    for (const [other, { button }] of this.segments.entries()) button.setAttribute("aria-current", other === index);
    this.caption.textContent = this.caption.title = this.segments[index]?.prompt ?? "";
  }

  #addToPage(segment) {
    const bar = document.createElement("div");
    bar.dataset.kind = segment.kind;
    bar.title = segment.prompt;
    bar.append(document.createElement("i"));
    this.bars.append(bar);
    const start = segment.start / this.#fps;
    const entry = this.#entry(clock(start), KINDS[segment.kind], segment.prompt);
    segment.button = entry.firstChild;
    segment.button.addEventListener("click", () => this.#canSeek && this.seek(start));
    this.list.insertBefore(entry, this.#pending?.nextSibling ?? this.list.firstChild); // the last one first
    this.story.hidden = false;
  }

  #entry(time, kind, prompt) {
    const button = document.createElement("button");
    button.type = "button";
    for (const [className, textContent] of Object.entries({ when: time, kind, prompt })) {
      button.append(Object.assign(document.createElement("span"), { className, textContent }));
    }
    const entry = document.createElement("li");
    entry.append(button);
    return entry;
  }

  #grab(event) {
    this.track.setPointerCapture(event.pointerId);
    this.#point(event);
  }

  #point(event) {
    const { left, width } = this.track.getBoundingClientRect();
    const seconds = Math.max(0, ((event.clientX - left) / width) * span(this.#seconds));
    const segment = this.segments[segmentAt(this.segments, seconds * this.#fps)];
    if (segment) this.caption.textContent = segment.prompt;
    if (this.#canSeek) this.seek(seconds);
  }

  #key(event) {
    const steps = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, Home: -Infinity, End: Infinity };
    if (!(event.key in steps) || !this.#canSeek) return;
    event.preventDefault();
    this.seek(Math.min(Math.max(0, this.#position + steps[event.key]), this.#seconds));
  }
}
