"""Streams over a WebSocket, from a real server with the embedded model: what a client asks for is what it gets."""

import threading
import time
from collections.abc import Callable

import numpy as np
import PIL.Image
import pytest
import torch
from websockets.exceptions import ConnectionClosed

from longlive_diffusers.assets import toy_decoder_path
from longlive_diffusers.limits import FPS
from longlive_diffusers.models.tiny_decoder import TinyVideoDecoder
from longlive_diffusers.pipelines.pipeline_longlive import LongLivePipeline
from longlive_diffusers.serve.app import LiveApp
from longlive_diffusers.serve.model import ServedModel
from longlive_diffusers.serve.settings import ServeSettings
from longlive_diffusers.serve.stage import Stage
from tests.support.live_server import (
    BLUE,
    GREEN,
    RED,
    LiveServer,
    Received,
    as_data_url,
    decoded,
    expected_media,
    running_server,
)


FIRST, LATER = 5, 8  # frames of the first chunk of the embedded model, and of all others


@pytest.mark.parametrize("media", ["mp4", "jpeg"])
def test_the_same_seed_gives_what_the_pipeline_gives(server: LiveServer, pipe: LongLivePipeline, media: str) -> None:
    with server.client() as client:
        received = client.watch(prompt=RED, seed=7, seconds=20 / FPS, video=media)

    num_frames = FIRST + 2 * LATER
    assert received.media == expected_media(pipe, RED, 7, 3, media, num_frames=num_frames)
    assert received.frames.shape == (num_frames, 64, 64, 3)
    (started,) = received.of("started")
    assert started["seed"] == 7 and started["fps"] == FPS and (started["height"], started["width"]) == (64, 64)
    assert started["mime"] == {"jpeg": "image/jpeg", "mp4": 'video/mp4; codecs="avc1.42c00a"'}[media]
    assert [
        (chunk["index"], chunk["start_frame"], chunk["num_frames"], chunk["shot_index"], chunk["prompt"])
        for chunk in received.of("chunk")
    ] == [(0, 0, FIRST, 0, RED), (1, FIRST, LATER, 0, RED), (2, FIRST + LATER, LATER, 0, RED)]
    assert all(chunk["denoise_seconds"] > 0 and chunk["decode_seconds"] > 0 for chunk in received.of("chunk"))
    (end,) = received.of("end")
    assert (end["reason"], end["num_frames"]) == ("finished", num_frames)
    assert end["latency"]["first_frame"] > 0 and end["latency"]["stalls"] >= 0


def test_every_chunk_is_followed_by_its_frames(server: LiveServer) -> None:
    with server.client() as client:
        client.send("start", prompt=RED, seconds=1)
        kinds = []
        while not kinds or kinds[-1] != "end":
            message = client.next()
            kinds.append("frame" if isinstance(message, bytes) else message["type"])
            if isinstance(message, bytes):
                client.send("played", frame=len(client.received.media) - 1)

    chunks = client.received.of("chunk")
    expected = [kind for chunk in chunks for kind in ["chunk", *["frame"] * chunk["num_frames"]]]
    assert kinds == ["started", *expected, "end"]


def test_a_stream_without_a_seed_says_which_it_has(server: LiveServer, pipe: LongLivePipeline) -> None:
    with server.client() as client:
        first, second = (client.watch(prompt=RED, seconds=0.1, video="jpeg") for _ in range(2))

    seeds = [received.of("started")[0]["seed"] for received in (first, second)]
    assert seeds[0] != seeds[1] and not np.array_equal(first.frames, second.frames)
    assert first.media == expected_media(pipe, RED, seeds[0], 1, "jpeg", num_frames=FIRST)


CHANGES = {
    "prompt": lambda session: setattr(session, "prompt", BLUE),
    "cut": lambda session: session.cut(BLUE),
    "blend": lambda session: session.blend(BLUE, chunks=2),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_acts_on_the_next_chunk(server: LiveServer, pipe: LongLivePipeline, kind: str) -> None:
    fields = {"chunks": 2} if kind == "blend" else {}
    with server.client() as client:
        client.send("start", prompt=RED, seed=3, video="jpeg")
        for _ in range(3):  # as many as are made ahead; no other is begun before the change has come
            client.whole_chunk()
        client.send(kind, prompt=BLUE, **fields)
        client.send("played", frame=FIRST + 2 * LATER - 1)
        changed = [client.whole_chunk(), client.whole_chunk()]
        client.send("stop")
        client.until("end", plays=False)

    assert [chunk["prompt"] for chunk in changed] == [BLUE, BLUE]
    assert [chunk["shot_index"] for chunk in changed] == ([1, 1] if kind == "cut" else [0, 0])

    def direct(session, index: int) -> None:
        if index == 3:
            CHANGES[kind](session)

    assert client.received.media == expected_media(pipe, RED, 3, 5, "jpeg", direct=direct)


def test_no_chunk_is_begun_more_than_two_beyond_the_one_that_is_watched(server: LiveServer) -> None:
    with server.client() as client:
        client.send("start", prompt=RED, video="jpeg")
        borders = [FIRST + LATER * index for index in range(6)]  # the first frame of each chunk but the first
        made = [client.whole_chunk()["index"] for _ in range(3)]
        for watched in range(1, 5):
            client.send("played", frame=borders[watched - 1] - 1)  # the last frame before a border: nothing is begun
            client.send("pause")  # an answer to the next message shows that this one has been acted on
            client.send("nonsense")
            client.until("error", plays=False)
            client.send("resume")
            client.send("played", frame=borders[watched - 1])
            made.append(client.whole_chunk()["index"])
        assert made == list(range(7))
        assert server.health()["sessions"] == 1
        client.send("stop")
        assert client.until("end", plays=False)["num_frames"] == FIRST + 6 * LATER


def test_a_stream_that_nobody_watches_waits_after_its_third_chunk(server: LiveServer) -> None:
    with server.client() as client:
        client.send("start", prompt=RED, video="jpeg")
        for _ in range(3):
            client.whole_chunk()
        with pytest.raises(TimeoutError):
            client.socket.recv(timeout=1.5)  # of which several chunks could have been made
        client.send("stop")
        assert client.until("end", plays=False) == {
            **client.received.messages[-1],
            "reason": "stopped",
            "num_frames": FIRST + 2 * LATER,
        }


def test_pause_and_resume(server: LiveServer) -> None:
    with server.client() as client:
        client.send("start", prompt=RED, video="jpeg")
        client.until("chunk")
        client.send("pause")
        client.send("nonsense")
        client.until("error")
        while len(client.received.media) < FIRST + 2 * LATER:  # at most what was begun before the pause
            try:
                data = client.socket.recv(timeout=1.5)
            except TimeoutError:
                break
            if isinstance(data, bytes):
                client.received.media.append(data)
        there = len(client.received.media)
        client.send("played", frame=there - 1)
        with pytest.raises(TimeoutError):
            client.socket.recv(timeout=1.0)
        client.send("resume")
        assert client.until("chunk")["start_frame"] == there
        client.send("stop")
        client.until("end")


def test_stop_ends_a_stream_and_another_can_begin(server: LiveServer) -> None:
    with server.client() as client:
        client.send("start", prompt=RED)
        client.until("chunk")
        client.send("stop")
        assert client.until("end")["reason"] == "stopped"
        assert client.watch(prompt=BLUE, seconds=0.1).of("end")[0]["reason"] == "finished"


def test_three_clients_at_once_get_what_they_would_alone(server: LiveServer, pipe: LongLivePipeline) -> None:
    prompts, received = [RED, BLUE, GREEN], {}

    def watch(prompt: str, seed: int) -> None:
        with server.client() as client:
            received[prompt] = client.watch(prompt=prompt, seed=seed, seconds=36 / FPS)

    threads = [threading.Thread(target=watch, args=(prompt, seed)) for seed, prompt in enumerate(prompts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    for seed, prompt in enumerate(prompts):
        alone = expected_media(pipe, prompt, seed, 5, num_frames=FIRST + 4 * LATER)
        assert received[prompt].media == alone


def test_streams_take_turns(server: LiveServer) -> None:
    with server.client() as first, server.client() as second:
        first.send("start", prompt=RED, video="jpeg")
        first.whole_chunk()
        second.send("start", prompt=BLUE, video="jpeg")
        second.whole_chunk()  # though the first could have gone on
        for client in (first, second):
            client.send("stop")
            client.until("end", plays=False)


def test_others_wait_and_see_their_place(pipe: LongLivePipeline) -> None:
    with (
        running_server({None: pipe}, ServeSettings(max_sessions=1, max_queue=2)) as server,
        server.client() as on,
        server.client() as second,
        server.client() as third,
        server.client() as fourth,
    ):
        on.send("start", prompt=RED)
        on.until("chunk")
        second.send("start", prompt=RED)
        assert second.until("queued")["position"] == 1
        third.send("start", prompt=RED, seconds=0.1)
        assert third.until("queued")["position"] == 2
        assert (server.health()["sessions"], server.health()["queue"]) == (1, 2)
        fourth.send("start", prompt=RED)
        assert fourth.until("error")["message"].startswith("1 stream being made and 2 waiting are")
        second.send("stop")
        assert (second.until("end")["reason"], second.received.of("end")[0]["num_frames"]) == ("stopped", 0)
        assert third.until("queued")["position"] == 1
        on.socket.close()  # who vanishes makes room
        third.until("end")
        assert third.received.of("started") and third.received.of("end")[0]["reason"] == "finished"
        fourth.watch(prompt=RED, seconds=0.1)


def test_a_stream_ends_after_the_time_that_is_allowed(pipe: LongLivePipeline) -> None:
    settings = ServeSettings(max_minutes=1.5 / 60)
    with running_server({None: pipe}, settings) as server, server.client() as client:
        client.send("start", prompt=RED)
        end = client.until("end")
        assert end["reason"] == "time" and end["num_frames"] == len(client.received.media) > 0


def test_a_server_that_stops_ends_its_streams_and_those_that_wait(pipe: LongLivePipeline) -> None:
    with (
        running_server({None: pipe}, ServeSettings(max_sessions=1)) as server,
        server.client() as client,
        server.client() as waiting,
    ):
        client.send("start", prompt=RED)
        client.until("chunk")
        waiting.send("start", prompt=RED)
        waiting.until("queued")
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        end = client.until("end", plays=False)
        assert (end["reason"], end["num_frames"]) == ("server", len(client.received.media))
        assert decoded(client.received.media).shape[0] == end["num_frames"]
        assert waiting.until("end")["reason"] == "server"
        stopping.join()


def test_an_image_begins_the_video_and_decides_its_shape(server: LiveServer, pipe: LongLivePipeline) -> None:
    image = PIL.Image.new("RGB", (96, 48), (200, 30, 30))
    with server.client() as client:
        received = client.watch(prompt=RED, seed=1, seconds=0.1, video="jpeg", image=as_data_url(image))

    (started,) = received.of("started")
    height, width = started["height"], started["width"]
    assert width / height == 2 and 0.5 < height * width / 64**2 < 1.5
    expected = expected_media(pipe, RED, 1, 1, "jpeg", image=image, height=height, width=width, num_frames=FIRST)
    assert received.media == expected


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"height": 72}, "`height` must be an integer, a multiple of 16"),
        ({"height": 128, "width": 64}, "height x width is 128 x 64 = 8192; at most 4096 are allowed."),
        ({"height": 16384, "width": 16384}, "at most 4096 are allowed."),
        ({"steps": 1001}, "steps must be an integer from 1 to 1000, not 1001."),
        ({"image": "data:image/png;base64,AAAA"}, "image is none of JPEG, PNG, WEBP, GIF, BMP."),
        ({"image": "data:image/png;base64,####"}, "image is not valid base64."),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(f"{k}={str(v)[:8]}" for k, v in value.items()),
)
def test_what_cannot_be_made_is_refused_in_one_line(server: LiveServer, fields: dict, message: str) -> None:
    with server.client() as client:
        client.send("start", prompt=RED, **fields)
        assert message in client.until("error")["message"]
        assert client.watch(prompt=RED, seconds=0.1).of("end")  # and nothing is lost


def test_who_asks_for_no_size_gets_one_that_is_allowed(pipe: LongLivePipeline) -> None:
    with running_server({None: pipe}, ServeSettings(max_pixels=48 * 48)) as server, server.client() as client:
        assert (server.health()["height"], server.health()["width"]) == (48, 48)
        (started,) = client.watch(prompt=RED, seconds=0.1).of("started")
        assert (started["height"], started["width"]) == (48, 48)
        client.send("start", prompt=RED, height=64, width=64)
        assert "64 x 64 = 4096; at most 2304 are allowed" in client.until("error")["message"]


def test_a_server_that_allows_less_than_a_picture_is_refused(pipe: LongLivePipeline) -> None:
    model = ServedModel("the embedded model", {None: pipe})
    with pytest.raises(ValueError, match="10 pixels are too few for a picture of the shape 64 x 64"):
        LiveApp(model, ServeSettings(max_pixels=10))


def test_settings_of_a_client_reach_the_pipeline(pipe: LongLivePipeline) -> None:
    """Steps choose among the server's pipelines; guidance, size and length are passed on."""
    with (
        running_server({None: pipe, "2 steps": pipe}, ServeSettings(steps=4, window_size=8, sink_size=2)) as server,
        server.client() as client,
    ):
        asked = {"steps": 2, "guidance_scale": 1.5, "height": 32, "width": 48}
        received: Received = client.watch(prompt=RED, seed=5, seconds=1, video="jpeg", **asked)

    options: dict[str, object] = {"height": 32, "width": 48, "num_inference_steps": 2, "guidance_scale": 1.5}
    options |= {"window_size": 8, "sink_size": 2, "num_frames": FIRST + 3 * LATER}
    assert received.media == expected_media(pipe, RED, 5, 4, "jpeg", **options)


def test_the_first_chunk_may_come_in_parts(pipe: LongLivePipeline) -> None:
    """The frames are the same; the first part is that of one latent frame, which is one frame."""
    with (
        running_server({None: pipe}, ServeSettings(steps=2, split_first_chunk=True)) as server,
        server.client() as client,
    ):
        received: Received = client.watch(prompt=RED, seed=5, seconds=1, video="jpeg")

    assert received.media == expected_media(
        pipe, RED, 5, 4, "jpeg", num_inference_steps=2, num_frames=FIRST + 3 * LATER
    )
    chunks = received.of("chunk")
    assert [chunk["index"] for chunk in chunks] == [0, 0, 1, 2, 3]
    assert [chunk["start_frame"] for chunk in chunks] == [0, 1, FIRST, FIRST + LATER, FIRST + 2 * LATER]


def test_a_stream_that_idles_gives_its_place_up_where_others_wait(
    pipe: LongLivePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longlive_diffusers.serve.stage.IDLE_SECONDS", 1.0)
    with (
        running_server({None: pipe}, ServeSettings(max_sessions=1)) as server,
        server.client() as idle,
        server.client() as waiting,
    ):
        idle.send("start", prompt=RED)
        for _ in range(3):
            idle.whole_chunk()
        waiting.send("start", prompt=BLUE, seconds=0.1)
        assert waiting.until("end")["reason"] == "finished"
        assert idle.until("end")["reason"] == "idle"


def test_a_stream_that_fails_is_no_others_concern(
    server: LiveServer, pipe: LongLivePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = pipe.vae.decoder.forward
    fails: list[Callable] = []

    def forward(*args, **kwargs):
        if fails:
            fails.pop()()
        return made(*args, **kwargs)

    def fail() -> None:
        raise RuntimeError("cannot open /home/somebody/secret.bin")

    monkeypatch.setattr(pipe.vae.decoder, "forward", forward)
    with server.client() as bad, server.client() as good:
        good.send("start", prompt=RED, video="jpeg")
        good.whole_chunk()
        while good.received.media and len(good.received.of("chunk")) < 3:
            good.whole_chunk()
        fails.append(fail)  # what is made next is the other's first chunk: this one waits for its viewer
        bad.send("start", prompt=BLUE)
        assert bad.until("error")["message"] == "The stream has failed (RuntimeError); the server's log says why."
        assert bad.until("end")["reason"] == "error"
        good.send("played", frame=FIRST + LATER)
        assert good.whole_chunk()["index"] == 3
        assert bad.watch(prompt=BLUE, seconds=0.1).of("end")[0]["reason"] == "finished"
        good.send("stop")
        good.until("end", plays=False)


def test_a_stream_waits_for_memory_that_another_one_has(
    pipe: LongLivePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pipe.stream(RED) as session:
        needed = session.planned_cache_bytes
        next(session)
        assert 0.9 < session.kv_cache_bytes / needed <= 1
    with (
        running_server({None: pipe}, ServeSettings(max_sessions=3)) as server,
        server.client() as first,
        server.client() as second,
    ):

        def memory_in_use(device: torch.device) -> dict[str, int]:
            others = server.app.model.sessions.num_open - 1  # of which the caller is one
            return {"used_bytes": 0, "total_bytes": 2 * needed, "free_bytes": int((1.5 - others) * needed)}

        monkeypatch.setattr("longlive_diffusers.serve.stream.memory_in_use", memory_in_use)
        first.send("start", prompt=RED, video="jpeg")
        first.whole_chunk()
        second.send("start", prompt=BLUE, video="jpeg")
        assert second.until("queued")["position"] == 1
        assert (server.health()["sessions"], server.health()["queue"]) == (1, 1)
        first.send("stop")
        assert first.until("end", plays=False)["reason"] == "stopped"
        second.whole_chunk()
        second.send("stop")
        second.until("end", plays=False)


def test_a_stream_that_never_fits_is_told_the_numbers(pipe: LongLivePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "longlive_diffusers.serve.stream.memory_in_use", lambda device: {"free_bytes": 2**20, "total_bytes": 0}
    )
    with running_server({None: pipe}) as server, server.client() as client:
        received = client.watch(prompt=RED)
        assert received.of("error")[0]["message"].endswith("MiB, and 1 MiB are free.")
        assert received.of("end")[0]["reason"] == "error" and server.app.model.sessions.num_open == 0


def test_a_tiny_decoder_makes_the_frames(pipe: LongLivePipeline) -> None:
    decoder = TinyVideoDecoder.from_pretrained(toy_decoder_path())
    with running_server({None: pipe}, decoder=decoder) as server, server.client() as client:
        received = client.watch(prompt=RED, seed=7, seconds=20 / FPS, video="jpeg")
    assert received.media == expected_media(pipe, RED, 7, 3, "jpeg", num_frames=21, decoder=decoder)


def test_a_mistake_in_the_stage_is_no_silence(pipe: LongLivePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would leave everybody waiting: the server says that it is not ready, lets nobody in, and can be stopped."""

    def fail(stage: Stage) -> None:
        raise KeyError("nobody thought of this")

    with running_server({None: pipe}) as server:
        monkeypatch.setattr(Stage, "_next", fail)
        with server.client() as client:
            client.send("start", prompt=RED)
            server.wait_until(lambda: not server.health()["ready"])
        assert server.get("/health").status == 503
        with server.client() as client, pytest.raises(ConnectionClosed) as error:
            client.next()
        assert error.value.rcvd is not None and error.value.rcvd.code == 1013
        monkeypatch.undo()


def test_time_that_the_viewer_holds_the_stream_is_not_the_servers(server: LiveServer) -> None:
    """What is the server's may be long, on a busy machine; `test_stream.py` has the exact numbers."""
    began = time.monotonic()
    with server.client() as client:
        client.send("start", prompt=RED, video="jpeg")
        for _ in range(3):
            client.whole_chunk()
        time.sleep(3)  # nobody watches
        client.send("played", frame=FIRST + 2 * LATER - 1)
        client.whole_chunk()
        client.send("pause")
        client.until("chunk", plays=False)  # what was begun
        time.sleep(2)
        client.send("resume")
        client.send("played", frame=FIRST + 4 * LATER - 1)
        client.until("chunk", plays=False)
        client.send("stop")
        latency = client.until("end", plays=False)["latency"]
    elapsed = time.monotonic() - began
    assert latency["stalled_seconds"] < elapsed - 3 - 2 + 1 and latency["between_chunks_p95"] < elapsed - 3


def test_time_before_its_turn_is_not_taken_from_a_streams(server: LiveServer, caplog) -> None:
    """Paused at once, when it waits for its turn; errors in the event loop would be logged."""
    with server.client() as client:
        client.send("start", prompt=RED, seconds=1, video="jpeg")
        client.send("pause")
        time.sleep(1)
        client.send("resume")
        client.until("chunk", plays=False)
        latency = client.until("end")["latency"]
    assert 0 < latency["first_frame"] < 1 + 3 and latency["between_chunks_p95"] > 0
    assert not [record for record in caplog.records if record.name == "asyncio"]


def test_who_counts_the_frames_that_were_played_says_the_same(server: LiveServer) -> None:
    with server.client() as client:
        client.send("start", prompt=RED, seconds=2, video="jpeg")
        while (message := client.next()) and not (isinstance(message, dict) and message["type"] == "end"):
            if isinstance(message, bytes):
                client.send("played", frame=len(client.received.media))
    assert not client.received.of("error")
    assert client.received.of("end")[0]["num_frames"] == FIRST + 6 * LATER
