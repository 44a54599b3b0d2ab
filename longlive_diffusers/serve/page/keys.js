// The keys of the page; a list of them is in index.html.

/** @param prompt The prompt's text area. @param does What keys do: `act`, `cut`, `toggle`. */
export function bindKeys(prompt, does) {
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Escape") prompt.blur();
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    if (event.shiftKey) does.cut();
    else does.act();
  });
  document.addEventListener("keydown", (event) => {
    if (!isSpaceForVideo(event)) return;
    event.preventDefault();
    if (!event.repeat) does.toggle();
  });
  // Firefox presses a button when the space bar is let go.
  document.addEventListener("keyup", (event) => isSpaceForVideo(event) && event.preventDefault());
}

/** Text fields keep their space bar, and a button that was reached by keyboard; one that was only clicked does not. */
function isSpaceForVideo({ key, target, isComposing }) {
  if (key !== " " || isComposing || target.matches("input, textarea, select, summary")) return false;
  return !target.matches("button:focus-visible");
}
