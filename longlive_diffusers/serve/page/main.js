// The page: what is clicked goes to the server, what the server says goes to the video, the timeline and the numbers.

import { Connection, socketUrl } from "./connection.js";
import { save } from "./download.js";
import { SHAPES_HELP, examples, isEmbedded } from "./examples.js";
import { defaults, describe, fetchHealth } from "./health.js";
import { bindKeys } from "./keys.js";
import { Notice } from "./notice.js";
import { numbersOf, writeNumbers } from "./numbers.js";
import { canPlay } from "./player_mse.js";
import { Settings } from "./settings.js";
import { Stage } from "./stage.js";
import { Stream, seconds } from "./stream.js";
import { Timeline, nearest } from "./timeline.js";

const H264 = 'video/mp4; codecs="avc1.42c01f"'; // to choose before the server has said what it sends exactly
const TRY_AGAIN_LATER = 1013; // a close code
const NUMBERS_EVERY = 0.25; // seconds; so often the server is told, too, which frame is on the screen
const QUIET_STALL = 0.7; // seconds; a shorter stall is counted, but not spoken of

/** Why a video has ended, by the server's word for it. */
const REASONS = {
  stopped: "Stopped",
  finished: "The video is complete",
  time: "This server gives a video no more time",
  idle: "It stood still while others waited, and has ended",
  error: "The video has ended with an error",
  server: "The server has stopped",
  lost: "The connection was lost",
  left: "The page was left",
};

const $ = (id) => document.getElementById(id);
const INTRODUCTION = $("status").textContent;
const query = new URLSearchParams(location.search);

let token = query.get("token");
let tokenRequired = false;
let isReached = true; // whether the server has answered when it was asked last
let connection = null;
let stream = null; // the last one that has begun
let playback = null; // "waiting", "playing", "held" or "ended"
let phase = "idle"; // connecting, beginning, queued, running, stopping, ended
let isAnswered = false; // whether the server has taken the last start
let place = 0; // in the queue
let reason = ""; // why the last video ended
let sent = 0; // when the last start was
let lastNumbers = 0;
let lastPlayed = -1;
let stalledSince = null;

const notice = new Notice($("notice"));
const settings = new Settings($("options-form"), (text) => notice.show(text));
const stage = new Stage($("stage"));
const timelineParts = { track: $("track"), list: $("prompts"), story: $("story"), caption: $("caption") };
const timeline = new Timeline(timelineParts, seek);

// --------------------------------------------------------------------------------------------- what the viewer wants
const isUnderWay = () => ["connecting", "beginning", "queued", "running"].includes(phase);

/** The prompt, or null after the form has said that there is none. */
function promptOrComplaint() {
  const text = $("prompt").value.trim();
  $("prompt").setCustomValidity(text ? "" : "Write what the video is to show.");
  return $("prompt-form").reportValidity() ? text : null;
}

function start() {
  if (!$("prompt").value.trim()) $("prompt").value = $("prompt").placeholder; // the example that is there to be seen
  const prompt = promptOrComplaint();
  if (prompt === null || !settings.check()) return;
  if (tokenRequired && !token) return askForToken();
  notice.hide();
  sent = seconds();
  isAnswered = false;
  phase = connection?.isUsable ? "beginning" : "connecting";
  if (phase === "connecting") connect();
  const wanted = query.get("video");
  const video = wanted === "jpeg" || wanted === "mp4" ? wanted : canPlay(H264) ? "mp4" : "jpeg";
  connection.send("start", { prompt, ...settings.fields(video) });
  render();
}

function change(kind) {
  const prompt = promptOrComplaint();
  if (prompt === null || phase !== "running") return;
  connection.send(kind, kind === "blend" ? { prompt, chunks: Number($("blend-chunks").value) } : { prompt });
  // What is on already may be asked for, and changes nothing but what was to come; a new shot that was, it remains.
  const isCut = kind === "cut" || stream.pending?.kind === "cut";
  const isSame = timeline.segments.at(-1)?.prompt === prompt && !isCut;
  if (isSame) stream.forgetPending();
  timeline.setPending(isSame ? null : stream.ask(isCut ? "cut" : kind, prompt));
}

/** What the main button does. */
function act() {
  if (phase === "running") change("prompt");
  else if (!isUnderWay() && phase !== "stopping") start();
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
  if (playback === "ended") {
    stream.isPaused = false;
    seek(0);
  } else {
    stream.isPaused = !stream.isPaused;
    if (phase === "running") connection.send(stream.isPaused ? "pause" : "resume");
    tick();
  }
}

function seek(to) {
  const at = stream ? nearest(stream.frames, to) : null;
  if (at === null) return;
  stream.seek(at);
  tick();
  renderNumbers();
}

// --------------------------------------------------------------------------------------------- what the server says
function connect() {
  connection = new Connection(socketUrl(document.baseURI, token), {
    message: (message) => on[message.type]?.(message), // a newer server may say more
    media: (buffer) => stream.take(buffer),
    closed,
  });
}

const on = {
  queued({ position }) {
    isAnswered = true;
    place = position;
    if (phase !== "stopping") phase = "queued";
    render();
  },

  started(message) {
    isAnswered = true;
    $("token-form").hidden = true; // it was the right one
    if (!isReached) readHealth(); // there is a server again
    if (phase === "queued") sent = seconds(); // what is measured is the model, not the queue
    if (phase !== "stopping") phase = "running";
    stream?.close();
    const screen = message.mime === "image/jpeg" ? $("canvas") : $("video");
    stage.show(screen, message);
    stream = new Stream(message, screen, sent, { failed, blocked });
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
    if (!isAnswered) ended("error"); // the start was refused, and no end follows, also of one that was stopped
  },

  end(message) {
    ended(message.reason);
  },
};

function ended(why) {
  phase = stream ? "ended" : "idle";
  timeline.setPending(null);
  if (stream && !stream.isComplete) {
    reason = REASONS[why] ?? "Ended";
    stream.finish();
  } // or a start was refused, and the video before it is still there
  render();
}

/** A browser may keep a page that is left, to come back to, and its connection, which holds a place on the server. */
function leave() {
  connection?.close();
  connection = null;
  if (isUnderWay() || phase === "stopping") ended("left");
}

async function closed({ wasOpen, code, reason: said }) {
  const wasUnderWay = isUnderWay() || phase === "stopping";
  ended("lost");
  if (wasOpen) {
    // Where nothing was under way, the next start connects again, and there is nothing to tell.
    const isFull = code === TRY_AGAIN_LATER;
    const why = isFull ? "The server takes no more connections now." : "The connection to the server was lost.";
    if (wasUnderWay) notice.show(said || why, { action: { label: "Start anew", act: start } });
    return;
  }
  // A browser does not tell why a connection was refused; whether there is a server at all can be asked.
  const health = await readHealth();
  if (health && tokenRequired) askForToken();
  let why = "The server cannot be reached.";
  if (health) why = `The server refuses the connection.${tokenRequired ? " Is the token right?" : ""}`;
  notice.show(why, { action: { label: "Try again", act: start } });
}

function failed(why) {
  console.warn(`The video cannot be shown: ${why}`);
  settings.chooseVideo("jpeg");
  notice.show("This browser cannot show the video. The next start asks for JPEG pictures.");
  stop();
}

function blocked() {
  stream.isPaused = true;
  const action = { label: "Play", act: toggle };
  notice.show("The browser does not let the video begin by itself.", { kind: "hint", action });
}

function askForToken() {
  $("token-form").hidden = false;
  $("token").focus();
}

async function readHealth() {
  const health = await fetchHealth(document.baseURI);
  $("server").textContent = describe(health);
  isReached = health !== null;
  if (!health) return null;
  tokenRequired = health.token_required === true;
  if (tokenRequired && !token) $("token-form").hidden = false;
  showExamples(String(health.model ?? ""));
  for (const [id, value] of Object.entries(defaults(health))) $(id).placeholder = value ?? "";
  if (health.ready === false) setTimeout(readHealth, 2000);
  return health;
}

function showExamples(model) {
  $("prompt-help").textContent = isEmbedded(model) ? SHAPES_HELP : "";
  const prompts = examples(model);
  $("prompt").placeholder = prompts[0];
  const buttons = prompts.map((text) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    button.addEventListener("click", () => {
      $("prompt").value = text;
      $("prompt").focus();
    });
    return button;
  });
  $("examples").replaceChildren(...buttons);
}

// --------------------------------------------------------------------------------------------- what the viewer sees
/** Let the video go on, and tell the server where the viewer is. */
function tick() {
  if (!stream) return;
  // A tab that nobody sees holds the video, and so the server pauses: numbers stay true, and nothing is made in vain.
  const isSeen = !document.hidden || Boolean(document.pictureInPictureElement); // undefined where there is none
  playback = stream.update(isSeen);
  const now = seconds();
  stalledSince = playback === "waiting" ? (stalledSince ?? now) : null;
  showState(now);
  if (now - lastNumbers < NUMBERS_EVERY) return;
  lastNumbers = now;
  stream.measure();
  renderNumbers();
  if (phase === "running" && stream.frame >= 0 && stream.frame !== lastPlayed) {
    lastPlayed = stream.frame;
    connection.send("played", { frame: lastPlayed });
  }
}

function showState(now) {
  const hasPicture = stream.firstFrame !== null;
  const isLong = now - stalledSince > QUIET_STALL;
  const texts = {
    playing: "",
    held: stream.isPaused ? "Paused" : "",
    ended: reason,
    waiting: !hasPicture ? "The first frames are being made" : isLong ? "Waiting for the next frames" : "",
  };
  stage.set(hasPicture ? playback : "beginning", phaseText() ?? texts[playback], hasPicture);
  $("toggle").dataset.does = playback === "held" || playback === "ended" ? "play" : "pause";
  const label = { held: "Play", ended: "Play again" }[playback] ?? "Pause";
  if ($("toggle").getAttribute("aria-label") !== label) $("toggle").setAttribute("aria-label", label);
}

/** What the page waits for beside the video, or null. */
function phaseText() {
  const texts = {
    connecting: "Connecting",
    beginning: "The video begins",
    queued: `Other videos are being made.\nYour place in the queue: ${place}`,
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
  $("download").disabled = !stream?.received;
}

function renderNumbers() {
  writeNumbers(numbersOf(stream));
  timeline.setPosition(stream.position, stream.ranges.length > 0);
  $("download").disabled = !stream.received;
}

function loop() {
  tick();
  requestAnimationFrame(loop);
}

// ----------------------------------------------------------------------------------------------------- the controls
$("prompt-form").addEventListener("submit", (event) => {
  event.preventDefault();
  act();
});
$("prompt").addEventListener("input", () => $("prompt").setCustomValidity(""));
$("cut").addEventListener("click", () => change("cut"));
$("blend").addEventListener("click", () => $("blend-chunks").reportValidity() && change("blend"));
$("stop").addEventListener("click", stop);
$("toggle").addEventListener("click", toggle);
$("download").addEventListener("click", () => {
  const hint = save(stream);
  if (hint) notice.show(hint, { kind: "hint" });
});
$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  token = $("token").value;
  $("token-form").hidden = true;
  connection?.close();
  connection = null;
  notice.hide();
  readHealth();
});
bindKeys($("prompt"), { act, cut: () => change("cut"), toggle });
document.addEventListener("visibilitychange", tick);
window.addEventListener("pagehide", leave);

readHealth();
loop();
