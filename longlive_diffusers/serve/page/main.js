// The page: what is clicked goes to the server, what the server says goes to the video, the timeline and the numbers.

import { Connection, socketUrl } from "./connection.js";
import { SHAPES_HELP, examples, isEmbedded } from "./examples.js";
import { Notice } from "./notice.js";
import { canPlay } from "./player_mse.js";
import { Settings } from "./settings.js";
import { Stage } from "./stage.js";
import { clock, duration, framesPerSecond, stallText } from "./statistics.js";
import { Stream, seconds } from "./stream.js";
import { Timeline, nearest } from "./timeline.js";

const H264 = 'video/mp4; codecs="avc1.42c01f"'; // to choose before the server has said what it sends exactly
const NUMBERS_EVERY = 0.25; // seconds
const QUIET_STALL = 0.7; // seconds; a shorter stall is counted, but not spoken of

const REASONS = {
  stopped: "Stopped",
  finished: "The video is complete",
  time: "This server gives a video no more time",
  error: "The video has ended with an error",
  server: "The server has stopped",
  lost: "The connection was lost",
};

const $ = (id) => document.getElementById(id);
const INTRODUCTION = $("status").textContent;
const query = new URLSearchParams(location.search);

let token = query.get("token");
let tokenRequired = false;
let connection = null;
let stream = null;
let phase = "idle"; // connecting, beginning, queued, running, stopping, ended
let position = 0; // in the queue
let reason = ""; // why the last video ended
let sent = 0; // when the last start was
let lastNumbers = 0;
let lastPlayed = -1;
let stalledSince = null;

const notice = new Notice($("notice"));
const settings = new Settings($("options-form"), (text) => notice.show(text));
const stage = new Stage($("stage"));
const timeline = new Timeline(
  { track: $("track"), list: $("prompts"), story: $("story"), caption: $("caption") },
  (to) => seek(to),
);

// --------------------------------------------------------------------------------------------- what the viewer wants
const isUnderWay = () => ["connecting", "beginning", "queued", "running"].includes(phase);
const prompt = () => $("prompt").value.trim();

/** The prompt, or null after the form has said that there is none. */
function promptOrComplaint() {
  $("prompt").setCustomValidity(prompt() ? "" : "Write what the video is to show.");
  return $("prompt-form").reportValidity() ? prompt() : null;
}

function start() {
  const text = promptOrComplaint();
  if (text === null || !settings.check()) return;
  if (tokenRequired && !token) return askForToken();
  notice.hide();
  sent = seconds();
  phase = connection?.isUsable ? "beginning" : "connecting";
  if (phase === "connecting") connect();
  const wanted = query.get("video");
  const video = wanted === "jpeg" || wanted === "mp4" ? wanted : canPlay(H264) ? "mp4" : "jpeg";
  connection.send("start", { prompt: text, ...settings.fields(video) });
  render();
}

function change(kind) {
  const text = promptOrComplaint();
  if (text === null || phase !== "running") return;
  connection.send(kind, kind === "blend" ? { prompt: text, chunks: Number($("blend-chunks").value) } : { prompt: text });
  const isSame = timeline.segments.at(-1)?.prompt === text && kind !== "cut"; // it may be sent, and changes nothing
  if (!isSame) timeline.setPending(stream.ask(kind, text));
}

function stop() {
  if (phase === "connecting") {
    connection.close();
    ended("stopped");
  } else if (isUnderWay()) {
    connection.send("stop");
    phase = "stopping";
  }
  render();
}

function toggle() {
  if (!stream) return;
  if (stage.state === "ended") {
    seek(0);
    stream.isPaused = false;
  } else {
    stream.isPaused = !stream.isPaused;
    if (phase === "running") connection.send(stream.isPaused ? "pause" : "resume");
  }
  tick();
  render();
}

function seek(to) {
  const at = stream ? nearest(stream.ranges, to) : null;
  if (at === null) return;
  // The very end shows nothing: the last frame begins before it.
  stream.seek(Math.max(0, Math.min(at, stream.length - 1 / stream.started.fps)));
  tick();
  renderNumbers();
}

function download() {
  const isMp4 = stream.started.mime.startsWith("video/mp4");
  const type = isMp4 ? "video/mp4" : "video/x-motion-jpeg";
  const url = URL.createObjectURL(stream.recording.blob(type));
  Object.assign(document.createElement("a"), { href: url, download: `longlive-${stream.started.seed}.${isMp4 ? "mp4" : "mjpeg"}` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000); // the browser reads it after this returns
  if (!isMp4) notice.show("It came as JPEG pictures, and is saved as Motion JPEG (.mjpeg): VLC and ffplay play it.", { kind: "hint" });
  else if (stream.recording.isFull) notice.show("The video is longer than what is kept: this is its first GiB.", { kind: "hint" });
}

// --------------------------------------------------------------------------------------------- what the server says
function connect() {
  connection = new Connection(socketUrl(document.baseURI, token), {
    message: (message) => on[message.type]?.(message), // a newer server may say more
    media: (buffer) => stream?.take(buffer),
    closed,
  });
}

const on = {
  queued(message) {
    position = message.position;
    if (phase !== "stopping") phase = "queued";
    render();
  },

  started(message) {
    if (phase === "queued") sent = seconds(); // what is measured is the model, not the queue
    stream?.close();
    if (phase !== "stopping") phase = "running";
    const screen = message.mime === "image/jpeg" ? $("canvas") : $("video");
    stage.show(screen, message);
    stream = new Stream(message, screen, sent, {
      failed(why) {
        console.warn(`The video cannot be shown: ${why}`);
        settings.chooseVideo("jpeg");
        notice.show("This browser cannot show the video. The next start asks for JPEG pictures.");
        stop();
      },
      blocked() {
        stream.isPaused = true;
        notice.show("The browser does not let the video begin by itself.", { kind: "hint", action: { label: "Play", act: toggle } });
      },
    });
    timeline.begin(message.fps);
    lastPlayed = -1;
    render();
  },

  chunk(message) {
    stream.announce(message);
    const segment = timeline.add(message, stream.pending);
    if (segment && stream.pending?.prompt === segment.prompt) {
      stream.arrived(segment.start);
      timeline.setPending(null);
    }
    render();
  },

  error({ message }) {
    notice.show(message);
    stream?.forgetPending();
    timeline.setPending(null);
  },

  end(message) {
    ended(message.reason);
  },
};

function ended(why) {
  const hasBegun = stream && !stream.isComplete; // or the start was refused, and the video before it is still there
  phase = stream ? "ended" : "idle";
  timeline.setPending(null);
  if (hasBegun) {
    reason = REASONS[why] ?? "Ended";
    stream.finish();
  }
  render();
}

async function closed({ wasOpen, reason: said }) {
  const wasUnderWay = isUnderWay() || phase === "stopping";
  ended("lost");
  if (wasOpen) {
    // Where nothing was under way, the next start connects again, and there is nothing to tell.
    if (wasUnderWay) notice.show(said || "The connection to the server was lost.", { action: { label: "Start anew", act: start } });
    return;
  }
  await readHealth();
  if (tokenRequired) askForToken();
  const why = tokenRequired ? "The server refuses the connection. Is the token right?" : "The server cannot be reached.";
  notice.show(said || why, { action: { label: "Try again", act: start } });
}

function askForToken() {
  $("token-form").hidden = false;
  $("token").focus();
}

async function readHealth() {
  let health;
  try {
    const url = new URL("health", document.baseURI);
    if (token) url.searchParams.set("token", token);
    health = await (await fetch(url)).json();
  } catch {
    // Whatever it is: the page works without, and a start will tell more.
    $("server").textContent = "Server not reached";
    return;
  }
  tokenRequired = health.token_required === true;
  const model = String(health.model ?? "");
  const name = isEmbedded(model) ? "Embedded model" : model;
  $("server").textContent = health.ready === false ? "Loading the model" : [name, String(health.device ?? "").replace(/^cpu$/, "CPU")].filter(Boolean).join(" · ");
  showExamples(model);
  if (tokenRequired && !token) $("token-form").hidden = false;
  if (health.ready === false) setTimeout(readHealth, 2000);
}

function showExamples(model) {
  $("prompt-help").textContent = isEmbedded(model) ? SHAPES_HELP : "";
  const prompts = examples(model);
  $("prompt").placeholder = prompts[0];
  $("examples").replaceChildren(
    ...prompts.map((text) => {
      const button = Object.assign(document.createElement("button"), { type: "button", textContent: text });
      button.addEventListener("click", () => {
        $("prompt").value = text;
        $("prompt").focus();
      });
      return button;
    }),
  );
}

// --------------------------------------------------------------------------------------------- what the viewer sees
/** Let the video go on, and tell the server where the viewer is. */
function tick() {
  if (!stream) return;
  // A tab that nobody sees holds the video, and so the server pauses: numbers stay true, and nothing is made in vain.
  const state = stream.update(!document.hidden || document.pictureInPictureElement !== null);
  const now = seconds();
  stalledSince = state === "waiting" ? (stalledSince ?? now) : null;
  showState(state, now);
  if (now - lastNumbers < NUMBERS_EVERY) return;
  lastNumbers = now;
  stream.measure();
  renderNumbers();
  if (phase === "running" && stream.frame >= 0 && stream.frame !== lastPlayed) {
    lastPlayed = stream.frame;
    connection.send("played", { frame: lastPlayed });
  }
}

function showState(state, now) {
  const hasPicture = stream.firstFrame !== null;
  const texts = {
    playing: "",
    held: stream.isPaused ? "Paused" : "",
    ended: reason,
    waiting: !hasPicture ? "The first frames are being made" : now - stalledSince > QUIET_STALL ? "Waiting for the next frames" : "",
  };
  stage.state = state;
  stage.set(hasPicture ? state : "beginning", phaseText() ?? texts[state], hasPicture);
  $("toggle").dataset.does = state === "held" || state === "ended" ? "play" : "pause";
  const label = { held: "Play", ended: "Play again" }[state] ?? "Pause";
  if ($("toggle").ariaLabel !== label) $("toggle").ariaLabel = label;
}

/** What the page waits for beside the video, or null. */
function phaseText() {
  const texts = {
    connecting: "Connecting",
    beginning: "The video begins",
    queued: `Other videos are being made.\nYour place in the queue: ${position}`,
    stopping: "Stopping",
  };
  return texts[phase] ?? null;
}

function render() {
  if (!stream) stage.set(phase, phaseText() ?? INTRODUCTION);
  $("main").textContent = isUnderWay() || phase === "stopping" ? "Change prompt" : "Start";
  $("main").disabled = isUnderWay() ? phase !== "running" : phase === "stopping";
  $("cut").disabled = $("blend").disabled = phase !== "running";
  $("stop").disabled = !isUnderWay();
  $("toggle").disabled = !stream;
  $("download").disabled = !stream || stream.received === 0;
}

function renderNumbers() {
  const { lastChunk } = stream;
  $("position").textContent = clock(stream.position);
  $("length").textContent = clock(stream.length);
  $("first-frame").textContent = duration(stream.firstFrame);
  $("prompt-latency").textContent = duration(stream.promptLatency);
  $("made").textContent = framesPerSecond(stream.made.value());
  $("shown").textContent = framesPerSecond(stream.shown.value());
  $("buffered").textContent = duration(stream.ahead);
  $("stalls").textContent = stallText(stream.stalls, stream.stalledSeconds);
  $("denoise").textContent = duration(lastChunk?.denoise_seconds ?? null);
  $("decode").textContent = duration(lastChunk?.decode_seconds ?? null);
  timeline.setPosition(stream.position, stream.frame, stream.ranges.length > 0);
  $("download").disabled = stream.received === 0;
}

function loop() {
  tick();
  requestAnimationFrame(loop);
}

// ------------------------------------------------------------------------------------------------- keys and buttons
function onKey(event) {
  const { target, key } = event;
  if (key === "Escape" && target === $("prompt")) return target.blur();
  if (key === "Enter" && (event.ctrlKey || event.metaKey) && target === $("prompt")) {
    event.preventDefault();
    if (event.shiftKey) change("cut");
    else act();
    return;
  }
  if (key !== " " || target.matches("input, textarea, select, summary")) return;
  // A button that was reached by keyboard is pressed by the space bar; one that was only clicked is not, again.
  if (target.matches("button") && target.matches(":focus-visible")) return;
  event.preventDefault();
  if (!event.repeat) toggle();
}

function act() {
  if (phase === "running") change("prompt");
  else if (!isUnderWay() && phase !== "stopping") start();
}

$("prompt-form").addEventListener("submit", (event) => {
  event.preventDefault();
  act();
});
$("prompt").addEventListener("input", () => $("prompt").setCustomValidity(""));
$("cut").addEventListener("click", () => change("cut"));
$("blend").addEventListener("click", () => $("blend-chunks").reportValidity() && change("blend"));
$("stop").addEventListener("click", stop);
$("toggle").addEventListener("click", toggle);
$("download").addEventListener("click", download);
$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  token = $("token").value;
  $("token-form").hidden = true;
  connection?.close();
  connection = null;
  notice.hide();
  readHealth();
});
document.addEventListener("keydown", onKey);
document.addEventListener("keyup", (event) => {
  // Firefox presses a button when the space bar is let go.
  if (event.key === " " && event.target.matches("button:not(:focus-visible)")) event.preventDefault();
});
document.addEventListener("visibilitychange", tick);

readHealth();
loop();
