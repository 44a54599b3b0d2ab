"""`longlive serve`: what it refuses before anything is loaded, and how it begins and ends."""

import contextlib
import json
import re
import signal
import socket
import time
import urllib.request
from collections.abc import Iterator, Sequence

import pytest

from longlive_diffusers.cli import main
from longlive_diffusers.cli.command_line import parse_arguments
from longlive_diffusers.cli.run_serve import check_access, shown_name
from longlive_diffusers.serve.access import Access
from tests.support.live_server import PATIENCE, RED, LiveClient
from tests.support.processes import ForkedProcess, environment, forking_launcher, free_port


REFUSED = {
    "--host 0.0.0.0": "--host 0.0.0.0 can be reached from other machines: give a --token, or --no-token",
    "--host :: --port 0": "--host :: can be reached from other machines",
    "--host no.such.host.invalid --no-token": "cannot listen on host 'no.such.host.invalid', port 7860: ",
    "--host 192.0.2.1 --token a": "cannot listen on host '192.0.2.1', port 7860: ",
    "--token a --no-token": "give either --token or --no-token, not both",
    "--model nowhere/to/be/found": "'nowhere/to/be/found'",
    "--devices 7": "7",
    "--kv-cache-dtype nvfp4 --window-size 1": "--window-size",
    "--max-pixels 10": "--max-pixels 10: 10 pixels are too few for a picture of the shape 64 x 64",
    "--lora-scale 2": "--lora-scale needs a --lora",
    "--origin example.com": "--origin must be like https://example.com or",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_what_cannot_be_served_is_refused_in_one_line(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *arguments.split()]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("longlive: error: ") and printed.count("\n") == 1
    assert REFUSED[arguments] in printed


@pytest.mark.parametrize("token", ["", " ", "a b", "a\nb", "schlüssel", "\t", "a\x7f"])
def test_a_token_that_cannot_be_sent_everywhere_is_refused(token: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--token", token]) == 2
    expected = "must be of letters, digits and signs of ASCII" if token.strip() else "--token is empty"
    assert expected in capsys.readouterr().err


NO_ORIGINS = """
    foo|example.com|http://a:b|https://a.com/path|ftp://a.com|*|https://例え.jp|https://bücher.example|http://a:٣|
    https://a.com;script-src|https://a,b|https://'none'|https://Example.com|http://[::FF]|https://a.com:443|
    http://a.com:80|http://a:0|http://a:65536|http://a:080
"""


@pytest.mark.parametrize("origin", ["", *NO_ORIGINS.replace("\n", "").replace(" ", "").split("|")])
def test_an_origin_that_no_page_has_is_refused(origin: str) -> None:
    expected = "must be like https://example.com or http://localhost:3000, as browsers send it"
    with pytest.raises(ValueError, match=f"--origin {expected}.*, not {re.escape(repr(origin))}$"):
        check_access(parse_arguments(["serve", "--origin", origin]))
    with pytest.raises(ValueError, match=f"`origins` {expected}"):
        Access(origins=(origin,))


def test_origins_that_pages_have_are_taken() -> None:
    names = ("example.com", "localhost:3000", "[::1]:8080", "a-b.c_d.example", "xn--r8jz45g.jp", "127.0.0.1:65535")
    for origin in (f"{scheme}://{name}" for scheme in ("http", "https") for name in names):
        check_access(parse_arguments(["serve", "--origin", origin]))
        assert Access(origins=(origin,)).refusal({"origin": origin}, {}) is None
    check_access(parse_arguments(["serve", "--origin", "http://a:443", "--origin", "https://a:80"]))


def test_a_port_in_use_is_known_before_models_are_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 2
        assert f"cannot listen on host '127.0.0.1', port {port}: Address already in use" in capsys.readouterr().err


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "uvicorn" else object())
    assert main(["serve"]) == 2
    assert (
        "longlive serve needs the package uvicorn: pip install 'longlive-diffusers[demo]'" in capsys.readouterr().err
    )


def test_no_path_is_shown_of_a_model(tmp_path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    assert shown_name(str(folder)) == shown_name(f"{folder}/") == "my-model"
    assert shown_name("somebody/longlive-5b") == "somebody/longlive-5b"


@contextlib.contextmanager
def serving(*arguments: str, starts: Sequence[str] = ("-m",)) -> Iterator[tuple[ForkedProcess, int]]:
    """A server in a process of its own, and its port; `starts` are the words before the module that is run."""
    port = free_port()
    command = ["longlive_diffusers.cli", "serve", "--port", str(port), *arguments]
    process = ForkedProcess([*starts, *command], environment())
    try:
        deadline = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
                assert json.load(answer)["ready"]
                break
            assert process.poll() is None and time.monotonic() < deadline, process.errors
            time.sleep(0.1)
        yield process, port
    finally:
        process.kill()


ENDS = {
    signal.SIGHUP: (129, "longlive: ended by SIGHUP; all streams were ended"),
    signal.SIGTERM: (143, "longlive: ended by SIGTERM; all streams were ended"),
    signal.SIGINT: (130, "longlive: interrupted"),
}


@pytest.mark.parametrize("number", ENDS, ids=lambda number: number.name)
def test_a_signal_ends_all_streams_properly(number: signal.Signals) -> None:
    with serving("--max-sessions", "1") as (process, port), contextlib.ExitStack() as stack:
        on, waiting = (stack.enter_context(LiveClient(f"ws://127.0.0.1:{port}/ws")) for _ in range(2))
        on.send("start", prompt=RED, steps=2)
        on.until("chunk")
        waiting.send("start", prompt=RED)
        waiting.until("queued")
        process.send_signal(number)
        end = on.until("end", plays=False)
        assert end["reason"] == "server" and end["num_frames"] == len(on.received.media)
        assert waiting.until("end")["reason"] == "server"
        ended_with, out, err = process.wait(PATIENCE), process.printed, process.errors
    status, line = ENDS[number]
    assert ended_with == status
    assert out == f"longlive: the embedded model on cpu: http://127.0.0.1:{port} (Ctrl-C ends it)\n"
    assert err.splitlines()[-1] == line and "Traceback" not in err


def test_two_devices_make_each_stream_together() -> None:
    """Two processes on the CPU, and one stream after the other, also one that is stopped."""
    with serving("--devices", "2", starts=forking_launcher(2)) as (process, port):
        with LiveClient(f"ws://127.0.0.1:{port}/ws") as client:
            received = client.watch(prompt=RED, seed=4, seconds=1)
            assert received.of("end")[0]["reason"] == "finished" and len(received.media) == 29
            client.send("start", prompt=RED)
            client.until("chunk")
            client.send("prompt", prompt="a large blue circle moves right on a black background")
            client.send("stop")
            assert client.until("end")["reason"] == "stopped"
            assert client.watch(prompt=RED, seed=4, seconds=1, steps=2).of("end")[0]["num_frames"] == 29
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 143
