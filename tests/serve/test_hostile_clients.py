"""Clients that vanish, flood, send garbage or never read: they cost nobody anything."""

import contextlib
import json
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed

from longlive_diffusers.pipelines.pipeline_longlive import LongLivePipeline
from longlive_diffusers.serve.settings import MESSAGE_BURST, ServeSettings
from tests.programs import visit_server
from tests.support.held_memory import growth
from tests.support.live_server import (
    BLUE,
    PATIENCE,
    RED,
    LiveServer,
    expected_media,
    running_server,
)
from tests.support.processes import run_program


def test_a_client_that_vanishes_frees_its_caches_and_its_place(pipe: LongLivePipeline) -> None:
    with running_server({None: pipe}, ServeSettings(max_sessions=1)) as server:
        gone = server.client()
        gone.send("start", prompt=RED)
        gone.until("chunk")
        with server.client() as waiting:
            waiting.send("start", prompt=BLUE, seconds=0.1)
            waiting.until("queued")
            gone.vanish()
            assert waiting.until("end")["reason"] == "finished"
        server.wait_until(lambda: server.is_empty)
        assert server.app.model.sessions.num_open == 0


def test_a_client_that_vanishes_before_its_stream_begins(pipe: LongLivePipeline) -> None:
    with running_server({None: pipe}, ServeSettings(max_sessions=1)) as server, server.client() as on:
        on.send("start", prompt=RED)
        on.until("chunk")
        gone = server.client()
        gone.send("start", prompt=BLUE)
        gone.until("queued")
        gone.vanish()
        server.wait_until(lambda: server.health()["queue"] == 0)
        on.send("stop")
        on.until("end")


def test_a_flood_ends_the_connection_of_its_sender_alone(server: LiveServer) -> None:
    with server.client() as good, server.client() as bad:
        good.send("start", prompt=RED)
        good.until("chunk")
        bad.send("start", prompt=BLUE)
        with contextlib.suppress(ConnectionClosed):  # perhaps before all are sent
            for _ in range(20 * MESSAGE_BURST):
                bad.send("resume")
        with pytest.raises(ConnectionClosed) as error:
            while True:
                bad.next()
        assert error.value.rcvd is not None and error.value.rcvd.code == 1008
        assert "More than 100 messages a second" in bad.received.of("error")[-1]["message"]
        server.wait_until(lambda: server.health()["sessions"] == 1)
        good.until("chunk")
        good.send("stop")
        good.until("end")


def test_a_client_that_never_reads_holds_three_chunks_at_most(server: LiveServer) -> None:
    with server.client() as silent, server.client() as good:
        silent.send("start", prompt=RED, video="jpeg")
        received = good.watch(prompt=BLUE, seconds=4, video="jpeg")
        assert received.of("end")[0]["reason"] == "finished"
        (stream,) = server.app.streams
        assert stream.num_frames == 5 + 8 + 8
        silent.vanish()  # a proper end would wait for what it does not read


def test_messages_that_are_too_long_end_their_connection(server: LiveServer) -> None:
    with server.client() as client, pytest.raises(ConnectionClosed) as error:
        client.socket.send("a" * (20 * 2**20))
        client.socket.recv(PATIENCE)
    # What the client still sends may reset the connection before the reason has come.
    assert error.value.rcvd is None or error.value.rcvd.code == 1009
    with server.client() as client:
        client.watch(prompt=RED, seconds=0.1)


@pytest.mark.parametrize("garbage", [b"\x00\xff", b"", b"\x80" * 1000])
def test_binary_messages_are_answered(server: LiveServer, garbage: bytes) -> None:
    with server.client() as client:
        client.socket.send(garbage)
        assert client.until("error")["message"] == "Messages are text, in JSON; this one is binary."


def test_words_out_of_place_are_answered(server: LiveServer) -> None:
    with server.client() as client:
        for kind, fields in {"prompt": {"prompt": "a"}, "cut": {"prompt": "a"}, "pause": {}, "resume": {}}.items():
            client.send(kind, **fields)
            assert client.until("error")["message"] == "There is no stream; start one."
        client.send("stop")  # which may have been on its way when a stream ended: no error
        client.send("played", frame=3)
        client.send("start", prompt=RED, video="jpeg")
        client.whole_chunk()
        client.send("start", prompt=BLUE)
        assert client.until("error", plays=False)["message"].startswith("There is a stream already;")
        client.send("played", frame=10_000)
        assert "frame 10000 is not there" in client.until("error", plays=False)["message"]
        client.send("stop")
        client.until("end", plays=False)


MESSAGES = st.one_of(
    st.text(),
    st.binary(),
    st.recursive(st.none() | st.integers() | st.text(), lambda inner: st.lists(inner)).map(json.dumps),
    st.fixed_dictionaries(
        {"type": st.sampled_from(["start", "prompt", "cut", "blend", "pause", "resume", "played", "stop", "end", ""])},
        optional={
            "prompt": st.sampled_from(["", RED, None, 3]) | st.text(),
            "frame": st.integers(),
            "chunks": st.integers(-2, 20),
            "seed": st.integers(-2, 2**70),
            "seconds": st.floats(-1, 0.5),
            "height": st.sampled_from([0, 16, 17, 64, 10**9]),
            "video": st.sampled_from(["mp4", "jpeg", "gif"]),
            "image": st.sampled_from(["", "data:image/png;base64,", "data:image/png;base64,AAAA"]),
        },
    ).map(json.dumps),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(script=st.lists(MESSAGES, max_size=12))
def test_any_sequence_of_messages_leaves_a_server_that_serves(server: LiveServer, script: list[str | bytes]) -> None:
    with server.client() as client:
        try:
            for message in script:
                client.socket.send(
                    message.encode("utf-8", "replace").decode() if isinstance(message, str) else message
                )
            client.send("stop")
            client.send("nonsense")
            for _ in range(1 + len(script)):
                while True:
                    data = client.socket.recv(PATIENCE)
                    if isinstance(data, str) and json.loads(data)["type"] == "error":
                        break
                if "nonsense" in data:
                    break
        except ConnectionClosed as error:  # not with text or JSON
            raise AssertionError(f"the connection was closed: {error}") from error


def test_steps_are_limited(server: LiveServer) -> None:
    with server.client() as client:
        client.send("start", prompt=RED, steps=51)
        assert client.until("error")["message"] == "steps is 51; at most 50 are allowed."


@pytest.mark.parametrize(("visits", "mebibytes"), [("connections", 2.5), ("pictures", 5)])
def test_clients_that_vanish_leave_nothing_behind(visits: str, mebibytes: float) -> None:
    """120 streams that end in every way there is, and pictures of as many pixels as are allowed."""
    used = json.loads(run_program(visit_server, visits))
    assert growth(used) < mebibytes * 2**20, [round(bytes / 2**20) for bytes in used]


@pytest.mark.parametrize("delay", [0.0, 0.01, 0.02, 0.04, 0.06, 0.08])
def test_a_chunk_that_is_interrupted_is_not_sent(server: LiveServer, pipe: LongLivePipeline, delay: float) -> None:
    """It is noise: what is sent is a beginning of what is sent of a stream that nobody stops."""
    with server.client() as client:
        client.send("start", prompt=RED, seed=9, video="jpeg")
        client.whole_chunk()
        client.whole_chunk()
        client.send("played", frame=12)
        time.sleep(delay)
        client.send("stop")
        end = client.until("end", plays=False)
    assert end["num_frames"] == len(client.received.media)
    assert client.received.media == expected_media(pipe, RED, 9, 5, "jpeg")[: len(client.received.media)]
