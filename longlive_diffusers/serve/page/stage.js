// The box that the video is shown in.

const CRISP_FROM = 3; // screen pixels for a pixel of the video, from which on pixels are shown as squares

/**
 * The size, in CSS pixels, of a video in a box. A small one is enlarged by a whole number of screen pixels and stays
 * crisp, a large one fills the box and is smoothed.
 */
export function fit(video, box, pixelRatio = 1) {
  const scale = Math.min(box.width / video.width, box.height / video.height) * pixelRatio;
  const isCrisp = scale >= CRISP_FROM;
  const used = (isCrisp ? Math.floor(scale) : scale) / pixelRatio;
  return { width: video.width * used, height: video.height * used, isCrisp };
}

export class Stage {
  #element;
  #status;
  #shown = null; // the <video> or <canvas>
  #size = { width: 16, height: 9 };

  constructor(element) {
    this.#element = element;
    this.#status = element.querySelector("#status");
    new ResizeObserver(() => this.#fit()).observe(element);
  }

  /** Show this element, and no other, for a video of this size. */
  show(element, size) {
    for (const other of this.#element.querySelectorAll("video, canvas")) other.hidden = other !== element;
    this.#shown = element;
    this.#size = size;
    this.#fit();
  }

  /** What the video is doing: the style goes by it, and the text is read out where it changes. */
  set(state, text, hasPicture = false) {
    this.#element.dataset.state = state;
    this.#element.toggleAttribute("data-picture", hasPicture);
    if (this.#status.textContent !== text) this.#status.textContent = text;
  }

  #fit() {
    if (!this.#shown) return;
    const box = { width: this.#element.clientWidth, height: this.#element.clientHeight };
    const { width, height, isCrisp } = fit(this.#size, box, devicePixelRatio);
    Object.assign(this.#shown.style, { width: `${width}px`, height: `${height}px` });
    this.#shown.style.imageRendering = isCrisp ? "pixelated" : "auto";
  }
}
