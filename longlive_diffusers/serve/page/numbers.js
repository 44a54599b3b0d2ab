// The numbers below the video.

import { clock, duration, framesPerSecond, stallText } from "./statistics.js";

export function numbersOf(stream) {
  return {
    position: clock(stream.position),
    length: clock(stream.length),
    "first-frame": duration(stream.firstFrame),
    "prompt-latency": duration(stream.promptLatency),
    made: framesPerSecond(stream.made.value()),
    shown: framesPerSecond(stream.shown.value()),
    buffered: duration(stream.ahead),
    stalls: stallText(stream.stalls, stream.stalledSeconds),
    denoise: duration(stream.lastChunk?.denoise_seconds ?? null),
    decode: duration(stream.lastChunk?.decode_seconds ?? null),
  };
}

/** Write each of them into the element of its name, where it has changed. */
export function writeNumbers(numbers) {
  for (const [id, text] of Object.entries(numbers)) {
    const element = document.getElementById(id);
    if (element.textContent !== text) element.textContent = text;
  }
}
