"""The page in a real browser, Debian's chromium, against a real server with the embedded model."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import av
import PIL.Image
import pytest

from longlive_diffusers.pipelines.pipeline_longlive import LongLivePipeline
from longlive_diffusers.serve.access import Access
from tests.support.live_server import BLUE, GREEN, RED, LiveServer, running_server


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytest.importorskip("selenium", reason="selenium is not installed: pip install -e '.[test-browser]'")
if CHROMIUM is None or DRIVER is None:
    pytest.skip("chromium or chromedriver is not installed", allow_module_level=True)

from selenium.webdriver.common.keys import Keys  # noqa: E402 (where it is there)

from tests.support.page import SIZE, Page, running_browser  # noqa: E402


# What the page sends from now on, in `sent`.
KEEP_WHAT_IS_SENT = """
window.sent = [];
const { send } = WebSocket.prototype;
WebSocket.prototype.send = function (text) {
  window.sent.push(JSON.parse(text));
  send.call(this, text);
};
"""

REFUSE_EVERY_THIRD_APPEND = """
let asked = 0;
window.refused = 0;
const { appendBuffer } = SourceBuffer.prototype;
SourceBuffer.prototype.appendBuffer = function (data) {
  asked += 1;
  if (asked % 3 === 0) {
    window.refused += 1;
    throw new DOMException("full", "QuotaExceededError");
  }
  appendBuffer.call(this, data);
};
"""

# Every text that is shown, with its contrast to what is behind it.
CONTRASTS = """
const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
const linear = (c) => (c / 255 <= 0.04045 ? c / 3294.6 : ((c / 255 + 0.055) / 1.055) ** 2.4);
const luminance = (color) => {
  const [red, green, blue] = numbers(color).map(linear);
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
};
const behind = (element) => {
  const color = getComputedStyle(element).backgroundColor;
  return numbers(color)[3] === 0 ? behind(element.parentElement) : color;
};
document.body.style.transition = "none";
for (const animation of document.getAnimations()) animation.finish?.();
const hasText = (element) => [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
const texts = [...document.querySelectorAll("body *")].filter((each) => each.checkVisibility() && hasText(each));
return texts.map((element) => {
  const [dark, light] = [luminance(getComputedStyle(element).color), luminance(behind(element))].sort((a, b) => a - b);
  return [element.textContent.trim(), (light + 0.05) / (dark + 0.05)];
});
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    home, downloads = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("downloads")
    with running_browser(CHROMIUM, DRIVER, home, downloads) as page:
        yield page


@pytest.fixture
def page(browser: Page) -> Iterator[Page]:
    """The browser, for one test, after which its console has no errors, and the server no viewer."""
    browser.clear()
    browser.expected_errors = ()
    yield browser
    errors = browser.errors()
    browser.driver.get("about:blank")
    assert [error for error in errors if not any(text in error for text in browser.expected_errors)] == []


def decoded(path: Path) -> int:
    """The number of frames of a file."""
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def frames_received(page: Page) -> int:
    minutes, seconds = page.text("length").split(":")
    return round((60 * int(minutes) + float(seconds) + 0.05) * 24)  # shown to a tenth, rounded down


SHOWN = "document.getElementById('video').getVideoPlaybackQuality().totalVideoFrames"


def test_the_video_plays_and_follows_the_prompt(page: Page, server: LiveServer) -> None:
    page.open(server)
    assert page.text("server") == "Embedded model · CPU"
    page.start(RED, seed=7)
    page.wait_for(f"{SHOWN} > 12")
    page.wait_for_color("red")
    assert page.text("main") == "Change prompt"

    page.write(BLUE)
    page.element("prompt").send_keys(Keys.CONTROL, Keys.ENTER)
    page.wait_for_color("blue")

    page.write(GREEN)
    page.press("cut")
    page.wait_for_color("green")
    page.wait_for("document.getElementById('prompt-latency').textContent.endsWith('s')")

    page.press("stop")
    page.wait_for_text("status", "Stopped")
    assert page.texts("#prompts .kind") == ["New shot", "Prompt", "Start"]  # the last one first
    assert page.texts("#prompts .prompt") == [GREEN, BLUE, RED]
    assert page.text("main") == "Start"

    file = page.downloaded()
    assert file.name == "longlive-7.mp4"
    assert abs(decoded(file) - frames_received(page)) <= 2

    # All of it can be seen again, from any prompt on.
    page.pause_again()
    page.driver.execute_script("document.querySelector('#prompts li:last-child button').click()")
    page.wait_for_color("red")
    assert page.text("caption") == RED
    page.element("track").send_keys(Keys.END)
    page.wait_for_text("caption", GREEN)
    page.press("toggle")
    page.wait_for_text("status", "Stopped")  # at the end


def test_a_glide_from_one_prompt_to_another(page: Page, server: LiveServer) -> None:
    page.open(server)
    page.driver.execute_script(KEEP_WHAT_IS_SENT)
    page.start(RED)
    page.wait_for_color("red")
    page.driver.execute_script("document.getElementById('blend-chunks').value = 3")
    page.write(BLUE)
    page.press("blend")
    page.wait_for_color("blue")
    assert page.texts("#prompts .kind") == ["Glide", "Start"]
    assert {"type": "blend", "prompt": BLUE, "chunks": 3} in page.js("sent")


def test_pictures_instead_of_an_mp4(page: Page, server: LiveServer) -> None:
    page.open(server, "?video=jpeg")
    page.start(RED, seconds=3, seed=7)
    page.wait_for_color("red")
    page.write(BLUE)
    page.press("main")
    page.wait_for_color("blue")
    page.wait_for_text("status", "The video is complete")
    file = page.downloaded()
    assert file.name == "longlive-7.mjpeg" and decoded(file) == 77  # in whole chunks
    page.pause_again()
    page.element("track").send_keys(Keys.HOME)
    page.wait_for_color("red")


TIME = "document.getElementById('video').currentTime"


def test_pause_holds_the_video_and_its_making(page: Page, server: LiveServer) -> None:
    page.open(server)
    page.driver.execute_script(KEEP_WHAT_IS_SENT)
    page.start(RED)
    page.wait_for(f"{SHOWN} > 2")
    page.wait_for("sent.some(({ type }) => type === 'played')")
    page.element("prompt").send_keys(Keys.ESCAPE)
    page.driver.switch_to.active_element.send_keys(Keys.SPACE)
    page.wait_for_text("status", "Paused")
    held = page.js(TIME)
    for prompt, pending in ((BLUE, 1), (RED, 0)):  # another prompt, and the old one again: nothing is to come
        page.write(prompt)
        page.press("main")
        assert len(page.texts("#prompts .pending")) == pending
    page.element("prompt").send_keys(Keys.ESCAPE)
    page.driver.switch_to.active_element.send_keys(Keys.SPACE)
    page.wait_for(f"{TIME} > {held} + 0.2")
    page.press("stop")
    page.wait_for_text("status", "Stopped")
    page.start(BLUE, seconds=0.2)  # another one, over the same connection
    page.wait_for_text("status", "The video is complete")
    page.wait_for_color("blue")

    sent = page.js("sent")
    assert [message["type"] for message in sent if message["type"] != "played"] == [
        "start", "pause", "prompt", "prompt", "resume", "stop", "start",
    ]  # fmt: skip
    first, second = [message for message in sent if message["type"] == "start"]
    assert first == {"type": "start", "prompt": RED, "video": "mp4"}
    assert second == {"type": "start", "prompt": BLUE, "video": "mp4", "seconds": 0.2}


def test_a_tab_that_nobody_sees_holds_the_video(page: Page, server: LiveServer) -> None:
    page.open(server)
    page.start(RED)
    page.wait_for(f"{SHOWN} > 2 && document.getElementById('stage').hasAttribute('data-picture')")
    page.driver.minimize_window()
    try:
        page.wait_for("document.hidden && document.getElementById('stage').dataset.state === 'held'")
        assert page.js("document.getElementById('video').paused")
        held = page.js(TIME)
    finally:
        page.driver.set_window_rect(0, 0, *SIZE)
    page.wait_for("!document.hidden")
    page.wait_for(f"{TIME} > {held}")


def test_a_page_that_is_left_holds_no_place_and_can_be_come_back_to(page: Page, server: LiveServer) -> None:
    page.open(server)
    page.start(RED)
    page.wait_for(f"{SHOWN} > 3")
    page.driver.get("about:blank")
    server.wait_until(lambda: server.is_empty)
    page.driver.back()
    page.wait_for_text("main", "Start")
    page.start(BLUE)
    page.wait_for_color("blue")


def test_a_full_buffer_is_no_end(page: Page, server: LiveServer) -> None:
    """Browsers give a SourceBuffer as much memory as they like, and refuse what is beyond it."""
    page.open(server)
    page.driver.execute_script(REFUSE_EVERY_THIRD_APPEND)
    page.start(RED, seconds=2)
    page.wait_for_text("status", "The video is complete")
    assert page.js("refused") > 3
    assert page.js(TIME) > 1.9


def test_a_video_begins_with_an_image(page: Page, server: LiveServer, tmp_path: Path) -> None:
    picture = tmp_path / "green.png"
    PIL.Image.new("RGB", (64, 64), (20, 160, 40)).save(picture)
    page.open(server)
    page.driver.execute_script(KEEP_WHAT_IS_SENT)
    page.element("image-file").send_keys(str(picture))
    page.wait_for("!document.getElementById('image-preview').hidden")
    page.start(RED, seconds=0.2)
    page.wait_for_text("status", "The video is complete")
    assert page.js("sent")[0]["image"].startswith("data:image/png;base64,")
    page.press("image-remove")
    (tmp_path / "text.txt").write_text("no image")
    page.element("image-file").send_keys(str(tmp_path / "text.txt"))
    page.wait_for_text("notice-text", "Only an image")
    assert page.js("document.getElementById('image-preview').hidden")


def test_one_waits_for_ones_place(page: Page, server: LiveServer) -> None:
    with contextlib.ExitStack() as others:
        clients = [others.enter_context(server.client(close_timeout=0.1)) for _ in range(3)]
        for client in clients:
            client.send("start", prompt=RED)
        server.wait_until(lambda: server.health()["sessions"] == 3)
        page.open(server)
        page.start(BLUE)
        page.wait_for_text("status", "Your place in the queue: 1")
        clients[0].send("stop")
        page.wait_for_color("blue")
    page.press("stop")
    page.wait_for_text("status", "Stopped")


def test_what_is_refused_is_said_and_can_be_mended(page: Page, server: LiveServer) -> None:
    page.open(server)
    page.press("main")
    assert page.js("document.activeElement.id") == "prompt"  # the form says that it is empty
    page.press("options")
    page.start(RED, width=1000, height=1000)
    page.wait_for("!document.getElementById('notice').hidden")
    assert "1000" in page.text("notice-text")
    assert page.text("main") == "Start"
    # The same for a start that is stopped before the server has answered it.
    press_both = "for (const name of ['main', 'stop']) document.getElementById(name).click();"
    status = "return document.getElementById('status').textContent"
    assert page.driver.execute_script(press_both + status) == "Stopping"
    page.wait_for("!document.getElementById('notice').hidden")
    assert page.text("main") == "Start" and page.element("main").is_enabled()
    page.press("notice-close")
    assert page.js("document.getElementById('notice').hidden")
    page.start(RED, width="", height="", seconds=0.2)
    page.wait_for_text("status", "The video is complete")


def test_a_server_that_stops_and_one_with_a_token(page: Page, pipe: LongLivePipeline) -> None:
    with running_server({None: pipe}, access=Access(token="open sesame")) as server:
        page.open(server)
        page.element("token").send_keys("sesame", Keys.ENTER)
        page.start(RED)
        page.wait_for_text("notice-text", "Is the token right?")
        page.expected_errors = ("WebSocket connection to",)
        page.element("token").clear()
        page.element("token").send_keys("open sesame", Keys.ENTER)
        page.press("main")
        page.wait_for_color("red")
        page.open(server, "?token=open+sesame")
        assert page.js("document.getElementById('token-form').hidden")
        page.start(RED)
        page.wait_for_color("red")
        server.stop()
        page.wait_for_text("status", "The server has stopped")


def test_a_video_waits_for_frames_and_says_how_long(page: Page, server: LiveServer) -> None:
    """24 fps, chunks of 8 frames: begin with little, wait for more after a stall, count each stall once."""
    page.open(server)
    steps = page.run(
        """
        const { Pacing, neededLead } = await import("./pacing.js");
        const pacing = new Pacing(24);
        const at = (now, ahead, more = {}) =>
          [pacing.update(now, { ahead, chunkSeconds: 1 / 3, complete: false, held: false, ...more }),
           pacing.stalls, pacing.stalledSeconds(now)];
        return [
          neededLead(false, 1.3), neededLead(true, 1.3), neededLead(true, 1 / 3),
          at(0, 0), at(1, 0.04), at(1.1, 0.125),  // the wait for the first frames is no stall
          at(1.4, 0), at(1.6, 0.1), at(1.9, 1 / 3),
          at(2, 0.01, { starved: true }), at(2.5, 0.01, { held: true }), at(9, 0.01, { held: true }), at(9.1, 0.5),
          at(9.5, 0, { complete: true }), at(9.6, 0.2, { complete: true }),
        ];
        """,
    )
    assert steps[:3] == [0.1, 0.5, pytest.approx(1 / 3)]
    assert [state for state, _, _ in steps[3:]] == [
        "waiting", "waiting", "playing", "waiting", "waiting", "playing", "waiting", "held", "held", "playing",
        "ended", "playing",
    ]  # fmt: skip
    assert [stalls for _, stalls, _ in steps[3:]] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 2]
    assert [stalled for _, _, stalled in steps[3:]] == pytest.approx([0, 0, 0, 0, 0.2, 0.5, 0.5, 1, 1, 1, 1, 1])


def test_segments_and_places_of_the_timeline(page: Page, server: LiveServer) -> None:
    page.open(server)
    kinds, places, found, nearest = page.run(
        """
        const { addChunk, layout, segmentAt, nearest } = await import("./timeline.js");
        const segments = [];
        const chunk = (start_frame, num_frames, shot_index, prompt, asked) =>
          addChunk(segments, { start_frame, num_frames, shot_index, prompt }, asked);
        chunk(0, 5, 0, "a"); chunk(5, 8, 0, "a"); chunk(13, 8, 0, "b"); chunk(21, 8, 0, "c", { kind: "blend" });
        chunk(29, 5, 1, "c");
        const ranges = [[1, 2], [4, 5]];
        return [
          segments.map(({ kind, start, end }) => [kind, start, end]), layout(segments, 2),
          [-1, 0, 12, 13, 33, 99].map((frame) => segmentAt(segments, frame)),
          [0, 1.5, 2.5, 3.5, 9].map((seconds) => nearest(ranges, seconds)).concat(nearest([], 1)),
        ];
        """,
    )
    assert kinds == [["start", 0, 13], ["prompt", 13, 21], ["blend", 21, 29], ["cut", 29, 34]]
    assert [place["left"] for place in places] == pytest.approx([0, 13 / 34, 21 / 34, 29 / 34])
    assert sum(place["width"] for place in places) == pytest.approx(1)
    assert found == [-1, 0, 0, 1, 3, 3]
    assert nearest == [1, 1.5, 2, 4, 5, None]


def test_how_numbers_are_written(page: Page, server: LiveServer) -> None:
    page.open(server)
    texts, rates = page.run(
        """
        const { Rate, clock, duration, framesPerSecond, stallText } = await import("./statistics.js");
        const rate = new Rate(4);
        const rates = [];
        for (let now = 0; now <= 20; now += 0.25) {  // 24 a second, for 10 seconds
          rate.add(now, Math.min(24 * now, 240));
          rates.push(rate.value());
        }
        return [
          [clock(0), clock(59.96), clock(3723.4), duration(0.0849), duration(1.318), duration(61),
           framesPerSecond(23.98), framesPerSecond(120.4), stallText(0, 0), stallText(2, 1.5)],
          [rates[0], rates[8], rates[39], rates[80]],
        ];
        """
    )
    assert texts[:3] == ["0:00.0", "0:59.9", "1:02:03.4"]
    assert texts[3:] == ["85 ms", "1.32 s", "61.0 s", "24.0 fps", "120 fps", "none", "2, 1.50 s"]
    assert rates == [None, pytest.approx(24), pytest.approx(24), pytest.approx(0)]


def test_a_small_video_is_enlarged_by_whole_pixels(page: Page, server: LiveServer) -> None:
    page.open(server)
    toy, retina, large = page.run(
        """
        const { fit } = await import("./stage.js");
        const [small, box] = [{ width: 64, height: 64 }, { width: 804, height: 452 }];
        return [fit(small, box), fit(small, box, 2), fit({ width: 1280, height: 704 }, box)];
        """
    )
    assert toy == {"width": 448, "height": 448, "isCrisp": True}  # 7 times
    assert retina == {"width": 448, "height": 448, "isCrisp": True}  # 14 times, in pixels half as large
    assert large == {"width": 804, "height": pytest.approx(442.2), "isCrisp": False}


def test_what_is_kept_and_what_is_let_go(page: Page, server: LiveServer) -> None:
    page.open(server)
    removed, kept, positions, urls = page.run(
        """
        const { removalEnd } = await import("./player_mse.js");
        const { Recording } = await import("./recording.js");
        const { advance } = await import("./player_jpeg.js");
        const { socketUrl } = await import("./connection.js");
        const removal = (start, position, bytesPerSecond) => removalEnd({ start, position, bytesPerSecond }, 2e7);
        const recording = new Recording();
        for (let index = 0; index < 9; index += 1) recording.add(new Uint8Array(2 ** 20).fill(index).buffer);
        const bytes = new Uint8Array(await recording.blob("video/mp4").arrayBuffer());
        const third = new Uint8Array(await recording.message(3).arrayBuffer());
        return [
          [removal(0, 60, 1e6), removal(35, 60, 1e6), removal(0, 100, 1e9)],
          [recording.length, recording.bytes, bytes.length, bytes[5 * 2 ** 20], bytes.at(-1), third.length, third[0]],
          [[0, 0.01, 0], [0, 9, 0], [0.3, 9, 7]].map(([position, elapsed, drawn]) =>
            advance(position, elapsed, { drawn, available: 8, fps: 24 })),
          [socketUrl("http://host:1/?video=jpeg#x", null), socketUrl("https://host/live/", "a b&c")],
        ];
        """
    )
    assert removed == [40, None, 90]  # 20 MB, or 10 seconds, and at least 10 seconds at once
    assert kept == [9, 9 * 2**20, 9 * 2**20, 5, 8, 2**20, 3]
    assert positions == [0.01, pytest.approx(2 / 24, abs=1e-4), 8 / 24]  # not beyond the frame after the one drawn
    assert urls == ["ws://host:1/ws", "wss://host/live/ws?token=a+b%26c"]


def test_pictures_that_are_not_kept_are_left_out(page: Page, server: LiveServer) -> None:
    """Eight pictures, of which three are kept and the last two were not seen."""
    page.open(server)
    ranges, first, again, failures, error = page.run(
        """
        const { Recording } = await import("./recording.js");
        const { JpegPlayer } = await import("./player_jpeg.js");
        const canvas = new OffscreenCanvas(8, 8);
        canvas.getContext("2d").fillRect(0, 0, 8, 8);
        const picture = await (await canvas.convertToBlob({ type: "image/jpeg" })).arrayBuffer();
        const recording = new Recording(3 * picture.byteLength);
        const failures = [];
        const handlers = { first() {}, failed: (why) => failures.push(why) };
        const player = new JpegPlayer(canvas, { fps: 100, width: 8, height: 8 }, handlers, recording);
        const add = (count) => {
          for (let index = 0; index < count; index += 1) { recording.add(picture); player.append(picture); }
        };
        const playTo = async (frame) => {
          while (player.frame !== frame && !failures.length) {
            player.run(true);
            await new Promise((go) => setTimeout(go, 1));
          }
          player.run(false);
          return player.shown;
        };
        const ranges = [player.ranges];
        add(6);
        const first = await playTo(5);
        ranges.push(player.ranges);
        add(2);
        ranges.push(player.ranges);
        player.seek(0);
        const again = (await playTo(7)) - first;
        let error = null;
        try { recording.message(3, "image/jpeg"); } catch ({ name }) { error = name; }
        return [ranges, first, again, failures, error];
        """
    )
    assert ranges == [[], [[0, 0.03]], [[0, 0.03], [0.06, 0.08]]]
    assert (first, again, failures, error) == (6, 3 + 2, [], "RangeError")


def test_what_is_behind_makes_room_for_the_end_of_a_video(page: Page, server: LiveServer) -> None:
    """A buffer may be full when nothing more is made: what was seen long ago goes, as before."""
    page.open(server)
    removed, appended, state = page.run(
        """
        let source, appended = 0;
        const removed = [];
        class FullBuffer extends EventTarget {
          appendBuffer() {
            if (!removed.length) throw new DOMException("full", "QuotaExceededError");
            appended += 1;
            queueMicrotask(() => this.dispatchEvent(new Event("updateend")));
          }
          remove(from, to) {
            removed.push([from, to]);
            queueMicrotask(() => this.dispatchEvent(new Event("updateend")));
            video.buffered.start = () => to;
          }
        }
        globalThis.MediaSource = class extends EventTarget {
          static isTypeSupported() { return true; }
          readyState = "open";
          constructor() { super(); source = this; }
          addSourceBuffer() { return new FullBuffer(); }
          endOfStream() { this.readyState = "ended"; }
        };
        URL.createObjectURL = () => "";
        const video = { currentTime: 60, buffered: { length: 1, start: () => 0, end: () => 61 } };
        const { MsePlayer } = await import("./player_mse.js?of-a-full-buffer");
        const player = new MsePlayer(video, { mime: "video/mp4", fps: 24 }, {});
        player.append(new ArrayBuffer(8 * 2 ** 20));
        player.finish();
        source.dispatchEvent(new Event("sourceopen"));
        await new Promise((go) => setTimeout(go, 10));
        return [removed, appended, source.readyState];
        """
    )
    assert (removed, appended, state) == ([[0, 50]], 1, "ended")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 880, 1280])
def test_it_is_readable_and_no_wider_than_the_screen(page: Page, server: LiveServer, width: int, scheme: str) -> None:
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    try:
        page.open(server)
        page.driver.execute_script("for (const details of document.querySelectorAll('details')) details.open = true")
        assert page.js("innerWidth") == width
        assert page.js("document.documentElement.scrollWidth") <= width
        page.driver.execute_script("for (const button of document.querySelectorAll('button')) button.disabled = false")
        contrasts = page.driver.execute_script(CONTRASTS)
        assert len(contrasts) > 30
        assert {text: contrast for text, contrast in contrasts if contrast < 4.5} == {}  # WCAG 2, level AA
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
