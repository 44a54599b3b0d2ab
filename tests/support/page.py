"""The page of `longlive serve` in a browser that selenium drives."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.common.exceptions import TimeoutException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from tests.support.live_server import PATIENCE, LiveServer


SIZE = (1280, 900)  # of the window
SET = "document.getElementById(arguments[0]).value = arguments[1]"  # keys, one by one, would take seconds
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

    def element(self, name: str) -> WebElement:
        return self.driver.find_element(By.ID, name)

    def text(self, name: str) -> str:
        return self.js(f"document.getElementById({name!r}).textContent")

    def texts(self, selector: str) -> list[str]:
        return [element.text for element in self.driver.find_elements(By.CSS_SELECTOR, selector)]

    def js(self, expression: str) -> Any:
        return self.driver.execute_script(f"return {expression}")

    def run(self, body: str) -> Any:
        """Return what the body of an asynchronous function returns; it can import the page's modules."""
        script = f"const done = arguments[0]; (async () => {{ {body} }})().then(done, (error) => done(String(error)))"
        return self.driver.execute_async_script(script)

    def press(self, name: str) -> None:
        self.element(name).click()

    def write(self, prompt: str) -> None:
        self.driver.execute_script(SET, "prompt", prompt)

    def start(self, prompt: str, **options: object) -> None:
        for name, value in options.items():
            self.driver.execute_script(SET, name, str(value))
        self.write(prompt)
        self.press("main")

    def pause_again(self) -> None:
        """After the end of a video, let it play again, and hold it."""
        self.press("toggle")
        self.press("toggle")
        self.wait_for_text("status", "Paused")

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
            new = set(self.downloads.iterdir()) - before
            # While it is being written, a file has other names.
            found[:] = [path for path in new if path.suffix != ".crdownload" and not path.name.startswith(".")]
            return bool(found) and len(found) == len(new)

        self._wait(is_there, "a download")
        return found[0]

    def _wait(self, is_so: Callable[[], bool], what: str) -> None:
        try:
            WebDriverWait(self.driver, PATIENCE, poll_frequency=0.03).until(lambda driver: is_so())
        except TimeoutException:
            state = {name: self.text(name) for name in ("status", "notice-text", "position", "length", "stalls")}
            raise AssertionError(f"never came true: {what}; {state}; {self.errors()}") from None


@contextlib.contextmanager
def running_browser(chromium: str, driver: str, home: Path, downloads: Path) -> Iterator[Page]:
    """Run a browser that finds and leaves nothing of its user's.

    Args:
        chromium: The browser.
        driver: The program that drives it.
        home: A folder of its own.
        downloads: Where it saves what is downloaded.
    """
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    # Where tests run as root, or in a container, chromium has no sandbox and little shared memory.
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", f"user-data-dir={home}"):
        options.add_argument(f"--{argument}")
    options.add_argument("--window-size={},{}".format(*SIZE))
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = Service(driver, env={**os.environ, "HOME": str(home)})
    browser = webdriver.Chrome(options=options, service=service)
    browser.set_script_timeout(PATIENCE)
    try:
        yield Page(browser, downloads)
    finally:
        browser.quit()
