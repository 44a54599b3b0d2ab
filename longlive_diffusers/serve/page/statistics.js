// Rates, and how numbers are written. No DOM in here.

/** The rate of something that is counted, over the last seconds. */
export class Rate {
  #samples = []; // [time, count], the first of them at the beginning of the window or just before it
  #window;

  constructor(windowSeconds = 4) {
    this.#window = windowSeconds;
  }

  /** Note that at this time, in seconds, the count (which only grows) has reached a number. */
  add(now, count) {
    this.#samples.push([now, count]);
    while (this.#samples.length > 2 && this.#samples[1][0] <= now - this.#window) this.#samples.shift();
  }

  /** Per second, or null as long as there is too little to tell. */
  value() {
    if (this.#samples.length < 2) return null;
    const [[first, from], [last, to]] = [this.#samples[0], this.#samples.at(-1)];
    return last - first < 0.5 ? null : (to - from) / (last - first);
  }
}

const NONE = "–";

/** `0:07.3`, `12:03.0`, `1:02:03.0` */
export function clock(seconds) {
  const tenths = Math.floor(seconds * 10 + 1e-6);
  const [hours, minutes, rest] = [Math.floor(tenths / 36000), Math.floor(tenths / 600) % 60, tenths % 600];
  const tail = `${(rest / 10).toFixed(1).padStart(4, "0")}`;
  return hours ? `${hours}:${String(minutes).padStart(2, "0")}:${tail}` : `${minutes}:${tail}`;
}

/** `85 ms`, `1.32 s`, `12.3 s` */
export function duration(seconds) {
  if (seconds === null || !Number.isFinite(seconds)) return NONE;
  if (seconds < 0.9995) return `${Math.round(seconds * 1000)} ms`;
  return `${seconds.toFixed(seconds < 9.995 ? 2 : 1)} s`;
}

export function framesPerSecond(rate) {
  return rate === null ? NONE : `${rate.toFixed(rate < 99.95 ? 1 : 0)} fps`;
}

export function stallText(count, seconds) {
  return count === 0 ? "none" : `${count}, ${duration(seconds)}`;
}
