"""Who may use a server: pages of its own origin, and whoever has its token."""

import pytest
from websockets.exceptions import InvalidStatus

from longlive_diffusers.pipelines.pipeline_longlive import LongLivePipeline
from longlive_diffusers.serve.access import Access, is_loopback
from tests.support.live_server import RED, LiveServer, running_server


OWN = [
    (Access(), "http://127.0.0.1:7860", "127.0.0.1:7860"),
    (Access(), "http://localhost:7860", "localhost:7860"),
    (Access(), "http://LOCALHOST:7860", "localhost:7860"),
    (Access(), "http://[::1]:7860", "[::1]:7860"),
    (Access(), "http://localhost:8080", "localhost:8080"),  # a port that was mapped to another one
    (Access(), "https://app.localhost", "app.localhost"),
    (Access(host="0.0.0.0"), "http://192.168.1.5:7860", "192.168.1.5:7860"),
    (Access(host="0.0.0.0"), "https://video.example.com", "video.example.com"),
    (Access(host="localhost"), "http://localhost:7860", "localhost:7860"),
    (Access(origins=("https://example.com",)), "https://example.com", "127.0.0.1:7860"),
]
FOREIGN = [
    (Access(), "https://example.com", "127.0.0.1:7860"),
    (Access(), "http://127.0.0.1:3000", "127.0.0.1:7860"),  # another program on this machine
    (Access(), "http://rebound.example.com:7860", "rebound.example.com:7860"),  # DNS rebinding
    (Access(), "http://127.0.0.1.example.com:7860", "127.0.0.1.example.com:7860"),
    (Access(), "null", "127.0.0.1:7860"),
    (Access(), "", ""),
    (Access(), "http://[::1", "[::1"),
    (Access(), "file://", "127.0.0.1:7860"),
    (Access(), "ftp://127.0.0.1:7860", "127.0.0.1:7860"),
    (Access(host="0.0.0.0"), "https://example.com", "192.168.1.5:7860"),
    (Access(origins=("https://example.com",)), "http://example.com", "127.0.0.1:7860"),
]


@pytest.mark.parametrize("access, origin, host", OWN, ids=lambda value: value if isinstance(value, str) else "")
def test_pages_of_the_own_origin_may(access: Access, origin: str, host: str) -> None:
    assert access.refusal({"origin": origin, "host": host}, {}) is None


@pytest.mark.parametrize("access, origin, host", FOREIGN, ids=lambda value: value if isinstance(value, str) else "")
def test_pages_of_another_origin_may_not(access: Access, origin: str, host: str) -> None:
    assert access.refusal({"origin": origin, "host": host}, {}) == "a page of another origin"


def test_programs_have_no_origin() -> None:
    assert Access().refusal({"host": "127.0.0.1:7860"}, {}) is None


TOKENS = [
    ({}, {"token": "secret"}, True),
    ({"authorization": "Bearer secret"}, {}, True),
    ({"authorization": "bearer secret"}, {"token": "wrong"}, True),
    ({}, {}, False),
    ({}, {"token": ""}, False),
    ({}, {"token": "secret "}, False),
    ({}, {"token": "sécret"}, False),
    ({"authorization": "Bearer wrong"}, {"token": "secret"}, False),
    ({"authorization": "Basic secret"}, {}, False),
]


@pytest.mark.parametrize("headers, query, may", TOKENS)
def test_tokens(headers: dict, query: dict, may: bool) -> None:
    refusal = Access(token="secret").refusal(headers, query)
    assert refusal == (None if may else "no token, or a wrong one")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost", "LocalHost", "a.localhost"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "example.com", "localhost.example.com", "", "127.1"])
def test_not_loopback(host: str) -> None:
    assert not is_loopback(host)


def test_a_server_refuses_other_origins(server: LiveServer) -> None:
    for origin in ("https://example.com", "null", "http://127.0.0.1:1"):
        with pytest.raises(InvalidStatus) as error:
            server.client(additional_headers={"Origin": origin})
        assert error.value.response.status_code == 403
    with server.client(additional_headers={"Origin": server.http}) as client:
        assert client.watch(prompt=RED, seconds=0.1).of("end")


def test_a_server_with_a_token(pipe: LongLivePipeline) -> None:
    with running_server({None: pipe}, access=Access(token="secret")) as server:
        for path, headers in (("/ws", {}), ("/ws?token=wrong", {}), ("/ws", {"Authorization": "Bearer x"})):
            with pytest.raises(InvalidStatus) as error:
                server.client(path, additional_headers=headers)
            assert error.value.response.status_code == 403
        assert server.health()["token_required"] is True
        assert server.get("/metrics").status == 403
        assert server.get("/metrics?token=secret").status == 200
        with server.client("/ws?token=secret") as client:
            assert client.watch(prompt=RED, seconds=0.1).of("end")
        with server.client(additional_headers={"Authorization": "Bearer secret"}) as client:
            assert client.watch(prompt=RED, seconds=0.1).of("end")
