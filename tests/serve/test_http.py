"""What a server says over HTTP: the page, its health, its metrics; and nothing else."""

import json
import re

import pytest

from longlive_diffusers.serve import messages
from tests.support.live_server import RED, LiveServer


def test_health(server: LiveServer) -> None:
    health = server.health()
    memory = health.pop("memory")
    assert health == {
        "ready": True,
        "version": health["version"],
        "model": "the embedded model",
        "device": "cpu",
        "height": 64,
        "width": 64,
        "steps": 4,
        "guidance_scale": 1.0,
        "sessions": 0,
        "max_sessions": 3,
        "queue": 0,
        "max_queue": 2,
        "connections": 0,
        "token_required": False,
    }
    assert 0 < memory["used_bytes"] < memory["total_bytes"] and 0 < memory["free_bytes"] <= memory["total_bytes"]


def test_metrics(server: LiveServer) -> None:
    before = numbers(server.get("/metrics").text)
    with server.client() as client:
        client.watch(prompt=RED, seconds=1)
    server.wait_until(lambda: server.is_empty)
    answer = server.get("/metrics")
    after = numbers(answer.text)
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    assert grown["longlive_chunks_total"] == 4 and grown["longlive_frames_total"] == 29
    assert grown['longlive_streams_ended_total{reason="finished"}'] == 1
    assert grown["longlive_first_frame_seconds_count"] == 1 and grown["longlive_between_chunks_seconds_count"] == 3
    assert grown["longlive_denoise_seconds_sum"] > 0 and grown["longlive_decode_seconds_sum"] > 0
    assert after['longlive_between_chunks_seconds{quantile="0.95"}'] > 0


def numbers(text: str) -> dict[str, float]:
    """The samples of Prometheus's text format, every line of which has to be one or a comment."""
    samples = {}
    for line in text.splitlines():
        if re.fullmatch(r"# (HELP|TYPE) \w+ .+", line):
            continue
        match = re.fullmatch(r'(\w+(?:\{\w+="[^"]*"\})?) (\S+)', line)
        assert match, line
        samples[match[1]] = float(match[2])
    return samples


def test_the_page_may_load_nothing_from_elsewhere(server: LiveServer) -> None:
    page = server.get("/")
    assert page.status == 200 and page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert "frame-ancestors 'none'" in policy and page.headers["x-content-type-options"] == "nosniff"
    names = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    for name in names:
        assert not name.startswith(("http", "//")), name
        if not name.startswith(("#", "data:")):
            assert server.get("/" + name.lstrip("./")).status == 200, name


def test_the_page_knows_the_limits_of_the_messages(server: LiveServer) -> None:
    page, settings = server.get("/").text, server.get("/settings.js").text
    tags = {
        name: tag
        for tag in re.findall(r"<(?:input|textarea) [^>]*>", page)
        for name in re.findall(r' id="([\w-]+)"', tag)
    }
    assert f'maxlength="{messages.MAX_PROMPT}"' in tags["prompt"]
    assert f'min="1" max="{messages.MAX_BLEND_CHUNKS}"' in tags["blend-chunks"]
    assert f'max="{messages.MAX_SECONDS}"' in tags["seconds"]
    assert f'min="1" max="{messages.MAX_STEPS}"' in tags["steps"]
    assert f"MAX_IMAGE_BYTES = {messages.MAX_IMAGE_BYTES // 2**20} * 2 ** 20;" in settings


@pytest.mark.parametrize("path", ["/nothing", "/../settings.py", "/%2e%2e/app.py", "/page/index.html", "//etc/passwd"])
def test_there_is_nothing_else(server: LiveServer, path: str) -> None:
    answer = server.get(path)
    assert answer.status == 404 and "longlive" not in answer.text


def test_a_websocket_is_no_page(server: LiveServer) -> None:
    assert server.get("/ws").status in (404, 426)
    assert json.loads(server.get("/health").text)["ready"]
