"""The page in a real browser, Debian's chromium, against a real server with the embedded model."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import pytest

from longlive_diffusers.pipelines.pipeline_longlive import LongLivePipeline
from longlive_diffusers.serve.access import Access
from tests.support.live_server import BLUE, GREEN, PATIENCE, RED, LiveServer, running_server


selenium = pytest.importorskip("selenium", reason="selenium is not installed: pip install -e '.[test-browser]'")

from selenium import webdriver  # noqa: E402 (after the skip)
from selenium.common.exceptions import TimeoutException  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402


CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="chromium and chromedriver are not installed (apt-get install)"
)

# What the page sends from now on, in `sent`.
KEEP_WHAT_IS_SENT = """
window.sent = [];
const { send } = WebSocket.prototype;
WebSocket.prototype.send = function (text) {
  window.sent.push(JSON.parse(text));
  send.call(this, text);
};
"""

# The name of the color that most of the colored pixels on the screen have, or null.
COLOR_ON_SCREEN = """
const shown = document.querySelector("#stage :is(video, canvas):not([hidden])");
if (!shown || (shown.tagName === "VIDEO" && shown.readyState < 2)) return null;
const copy = new OffscreenCanvas(64, 64).getContext("2d");
copy.drawImage(shown, 0, 0, 64, 64);
const { data } = copy.getImageData(0, 0, 64, 64);
const counts = { red: 0, green: 0, blue: 0 };
for (let at = 0; at < data.length; at += 4) {
  const rgb = [data[at], data[at + 1], data[at + 2]];
  const strongest = rgb.indexOf(Math.max(...rgb));
  if (rgb[strongest] > 60 + Math.min(...rgb)) counts[Object.keys(counts)[strongest]] += 1;
}
const [name, count] = Object.entries(counts).sort(([, a], [, b]) => b - a)[0];
return count < 60 ? null : name;
"""


# Every text that is shown, with its contrast to what is behind it.
CONTRASTS = """
const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
const luminance = (color) => {
  const linear = numbers(color).slice(0, 3).map((c) => (c / 255 <= 0.04045 ? c / 3294.6 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
};
const behind = (element) => {
  const color = getComputedStyle(element).backgroundColor;
  return numbers(color)[3] === 0 ? behind(element.parentElement) : color;
};
document.body.style.transition = "none";
for (const animation of document.getAnimations()) animation.finish?.();
const texts = [...document.querySelectorAll("body *")].filter(
  (element) => element.checkVisibility() && [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim()),
);
return texts.map((element) => {
  const [dark, light] = [luminance(getComputedStyle(element).color), luminance(behind(element))].sort((a, b) => a - b);
  return [element.textContent.trim(), (light + 0.05) / (dark + 0.05)];
});
"""


class Page:
    """The page, as a viewer has it."""

    def __init__(self, driver: webdriver.Chrome, downloads: Path):
        self.driver, self.downloads = driver, downloads
        self.expected_errors: tuple[str, ...] = ()  # what the console may say
        self.clear()

    def clear(self) -> None:
        """Forget downloads and what the console said."""
        for path in self.downloads.iterdir():
            path.unlink()
        self.errors()

    def open(self, server: LiveServer, query: str = "") -> None:
        self.driver.get(f"{server.http}/{query}")
        self.wait_for("document.getElementById('examples').children.length > 0")  # health has been read

    def element(self, name: str) -> Any:
        return self.driver.find_element(By.ID, name)

    def text(self, name: str) -> str:
        return self.js(f"document.getElementById({name!r}).textContent")

    def js(self, expression: str) -> Any:
        return self.driver.execute_script(f"return {expression}")

    def press(self, name: str) -> None:
        self.element(name).click()

    def write(self, prompt: str) -> None:
        self.element("prompt").clear()
        self.element("prompt").send_keys(prompt)

    def start(self, prompt: str, **options: object) -> None:
        for name, value in options.items():
            self.driver.execute_script("document.getElementById(arguments[0]).value = arguments[1]", name, str(value))
        self.write(prompt)
        self.press("main")

    def wait_for(self, expression: str) -> None:
        """Wait until an expression of JavaScript is true."""
        self._wait(lambda: self.js(expression), expression)

    def wait_for_text(self, name: str, text: str) -> None:
        self._wait(lambda: text in self.text(name), f"{text!r} in #{name}")

    def wait_for_color(self, color: str) -> None:
        self._wait(lambda: self.driver.execute_script(COLOR_ON_SCREEN) == color, f"{color} on the screen")

    def errors(self) -> list[str]:
        """What the console has said since the last call, of errors."""
        entries = [entry for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]
        return [entry["message"] for entry in entries]

    def downloaded(self) -> Path:
        """Press the button, and return the file."""
        before = set(self.downloads.iterdir())
        self.press("download")
        found: list[Path] = []

        def is_there() -> bool:
            found[:] = [path for path in set(self.downloads.iterdir()) - before if path.suffix != ".crdownload"]
            return bool(found) and not list(self.downloads.glob("*.crdownload"))

        self._wait(is_there, "a download")
        return found[0]

    def _wait(self, is_so: Any, what: str) -> None:
        try:
            WebDriverWait(self.driver, PATIENCE, poll_frequency=0.03).until(lambda driver: is_so())
        except TimeoutException:
            state = {name: self.text(name) for name in ("status", "notice-text", "position", "length", "stalls")}
            raise AssertionError(f"never came true: {what}; {state}; {self.errors()}") from None


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A browser of its own, which finds and leaves nothing of its user's."""
    home, downloads = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("downloads")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    # Where tests run as root, or in a container, chromium has no sandbox and little shared memory.
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", f"user-data-dir={home}"):
        options.add_argument(f"--{argument}")
    options.add_argument("--window-size=1280,900")
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = Service(DRIVER, env={**os.environ, "HOME": str(home)})
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_script_timeout(PATIENCE)
    try:
        yield Page(driver, downloads)
    finally:
        driver.quit()


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
    kinds = page.js("[...document.querySelectorAll('#prompts button')].map((button) => button.children[1].textContent)")
    prompts = page.js("[...document.querySelectorAll('#prompts .prompt')].map((span) => span.textContent)")
    assert kinds == ["New shot", "Prompt", "Start"] and prompts == [GREEN, BLUE, RED]  # the last one first
    assert page.text("main") == "Start"

    file = page.downloaded()
    assert file.name == "longlive-7.mp4"
    assert abs(decoded(file) - frames_received(page)) <= 2

    # All of it can be seen again, from any prompt on.
    page.driver.execute_script("document.querySelector('#prompts li:last-child button').click()")
    page.wait_for_color("red")
    assert page.text("caption") == RED
    page.wait_for_text("status", "Stopped")  # at the end again


def test_pictures_instead_of_an_mp4(page: Page, server: LiveServer) -> None:
    page.open(server, "?video=jpeg")
    page.start(RED, seconds=4, seed=7)
    page.wait_for_color("red")
    page.write(BLUE)
    page.press("main")
    page.wait_for_color("blue")
    page.wait_for_text("status", "The video is complete")
    file = page.downloaded()
    assert file.name == "longlive-7.mjpeg" and decoded(file) == 101  # chunks that 96 frames take
    page.press("toggle")  # again
    page.wait_for_color("red")
    page.press("toggle")
    page.wait_for_text("status", "Paused")


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
    page.driver.switch_to.active_element.send_keys(Keys.SPACE)
    page.wait_for(f"{TIME} > {held} + 0.2")
    page.press("stop")
    page.wait_for_text("status", "Stopped")
    page.start(BLUE, seconds=0.2)  # another one, over the same connection
    page.wait_for_text("status", "The video is complete")
    page.wait_for_color("blue")

    sent = page.js("sent")
    assert [message["type"] for message in sent if message["type"] != "played"] == [
        "start", "pause", "resume", "stop", "start",
    ]  # fmt: skip
    assert sent[0] == {"type": "start", "prompt": RED, "video": "mp4"}
    assert sent[-1 - [message["type"] for message in sent[::-1]].index("start")]["seconds"] == 0.2


def test_a_tab_that_nobody_sees_holds_the_video(page: Page, server: LiveServer) -> None:
    page.open(server)
    page.start(RED)
    page.wait_for(f"{SHOWN} > 2")
    page.driver.minimize_window()
    try:
        page.wait_for("document.hidden && document.getElementById('video').paused")
        held, stalls = page.js(TIME), page.text("stalls")
        page.wait_for("document.getElementById('buffered').textContent !== '–'")
        assert page.js(TIME) == held
    finally:
        page.driver.set_window_rect(0, 0, 1280, 900)
    page.wait_for("!document.hidden")
    page.wait_for(f"{TIME} > {held} + 0.1")
    assert stalls in ("none", page.text("stalls")) or page.text("stalls").startswith(stalls.split(",")[0])


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


def in_page(page: Page, body: str) -> Any:
    """Return what the body of an asynchronous function returns; it can import the page's modules."""
    script = f"const done = arguments[0]; (async () => {{ {body} }})().then(done, (error) => done(String(error)))"
    return page.driver.execute_async_script(script)


def test_a_video_waits_for_frames_and_says_how_long(page: Page, server: LiveServer) -> None:
    """24 fps, chunks of 8 frames: begin with little, wait for more after a stall, count each stall once."""
    page.open(server)
    steps = in_page(
        page,
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
    kinds, places, found, nearest = in_page(
        page,
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


def test_what_is_kept_and_how_it_is_written(page: Page, server: LiveServer) -> None:
    page.open(server)
    texts, rates, sizes, removed, kept, clocked, urls = in_page(
        page,
        """
        const { Rate, clock, duration, framesPerSecond, stallText } = await import("./statistics.js");
        const { fit } = await import("./stage.js");
        const { removalEnd } = await import("./player_mse.js");
        const { Recording } = await import("./recording.js");
        const { advance } = await import("./player_jpeg.js");
        const { socketUrl } = await import("./connection.js");
        const rate = new Rate(4);
        const rates = [];
        for (let now = 0; now <= 20; now += 0.25) { rate.add(now, now < 10 ? 24 * now : 240); rates.push(rate.value()); }
        const recording = new Recording();
        for (let index = 0; index < 9; index += 1) recording.add(new Uint8Array(2 ** 20).fill(index).buffer);
        const bytes = new Uint8Array(await recording.blob("video/mp4").arrayBuffer());
        const third = new Uint8Array(await recording.message(3).arrayBuffer());
        return [
          [clock(0), clock(59.96), clock(3723.4), duration(null), duration(0.0849), duration(1.318), duration(61),
           framesPerSecond(null), framesPerSecond(23.98), stallText(0, 0), stallText(2, 1.5)],
          [rates[0], rates[8], rates[39], rates[80]],
          [fit({ width: 64, height: 64 }, { width: 804, height: 452 }), fit({ width: 64, height: 64 }, { width: 804, height: 452 }, 2),
           fit({ width: 1280, height: 704 }, { width: 804, height: 452 })],
          [removalEnd({ start: 0, position: 60, bytesPerSecond: 1e6 }, 2e7), removalEnd({ start: 35, position: 60, bytesPerSecond: 1e6 }, 2e7),
           removalEnd({ start: 0, position: 100, bytesPerSecond: 1e9 }, 2e7)],
          [recording.length, recording.bytes, bytes.length, bytes[5 * 2 ** 20], bytes.at(-1), third.length, third[0]],
          [advance(0, 0.01, { drawn: 0, available: 8, fps: 24 }), advance(0, 9, { drawn: 0, available: 8, fps: 24 }) * 24,
           advance(0.3, 9, { drawn: 7, available: 8, fps: 24 }) * 24],
          [socketUrl("http://host:1/?video=jpeg#x", null), socketUrl("https://host/live/", "a b&c")],
        ];
        """,
    )
    assert texts == [
        "0:00.0", "0:59.9", "1:02:03.4", "–", "85 ms", "1.32 s", "61.0 s", "–", "24.0 fps", "none", "2, 1.50 s",
    ]  # fmt: skip
    assert rates == [None, pytest.approx(24), pytest.approx(24), pytest.approx(0)]
    assert sizes == [
        {"width": 448, "height": 448, "isCrisp": True},  # 7 times
        {"width": 448, "height": 448, "isCrisp": True},  # 14 times, of half as large pixels
        {"width": 804, "height": pytest.approx(442.2), "isCrisp": False},
    ]
    assert removed == [40, None, 90]
    assert kept == [9, 9 * 2**20, 9 * 2**20, 5, 8, 2**20, 3]
    assert clocked == [0.01, pytest.approx(2, abs=1e-3), 8]  # never beyond the frame after the one that is drawn
    assert urls == ["ws://host:1/ws", "wss://host/live/ws?token=a+b%26c"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 880, 1280])
def test_nothing_is_wider_than_the_screen(page: Page, server: LiveServer, width: int, scheme: str) -> None:
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
