"""The application as a deployment of Ray Serve: two replicas of the embedded model on this CPU, behind Ray's proxy."""

import asyncio
import contextlib
import http.client
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from longlive_diffusers.limits import FPS
from longlive_diffusers.pipelines.pipeline_longlive import LongLivePipeline
from longlive_diffusers.serve.settings import ServeSettings
from tests.support.live_server import BLUE, PATIENCE, RED, LiveClient, expected_media
from tests.support.processes import environment, free_port


pytest.importorskip("ray.serve", reason="needs the extra ray")

from longlive_diffusers.cli import run_serve_ray
from longlive_diffusers.cli.command_line import parse_arguments
from longlive_diffusers.cli.ray_app import app, as_arguments
from longlive_diffusers.serve.ray_deployment import deployment_options
from longlive_diffusers.serve.ray_router import FewestClients
from longlive_diffusers.serve.replicas import Replicas


TOKEN = "secret"


@dataclass
class RayServer:
    """`longlive serve --ray` in a process of its own."""

    process: subprocess.Popen
    port: int
    errors: Path  # what it prints there

    def client(self, query: str = f"?token={TOKEN}", **options) -> LiveClient:
        return LiveClient(f"ws://127.0.0.1:{self.port}/ws{query}", **options)

    def get(self, path: str) -> tuple[int, str]:
        """Ask for a path over HTTP; return the status and the text."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)) as connection:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def replicas(self) -> list[psutil.Process]:
        """The processes of the replicas."""
        processes = psutil.Process(self.process.pid).children(recursive=True)
        return [process for process in processes if process.name().startswith("ray::ServeRepli")]


@pytest.fixture(scope="module")
def ray_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayServer]:
    """Two replicas, which make two streams at once each."""
    port = free_port()
    options = ["--device=cpu", "--replicas=2", f"--port={port}", f"--token={TOKEN}"]
    errors = tmp_path_factory.mktemp("ray") / "stderr.txt"
    with errors.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "longlive_diffusers.cli", "serve", "--ray", *options],
            env=environment(RAY_USAGE_STATS_ENABLED=0),
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
        )
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        address = f"http://127.0.0.1:{port}/?token={TOKEN}"
        assert said == f"longlive: 2 replicas on cpu: {address} (Ctrl-C ends it)\n", errors.read_text()
        yield RayServer(process, port, errors)
    finally:
        process.terminate()
        process.communicate(timeout=PATIENCE)


def test_two_clients_get_what_the_pipeline_gives(ray_server: RayServer, pipe: LongLivePipeline) -> None:
    with ray_server.client() as first, ray_server.client() as second:
        for client, prompt, seed in ((first, RED, 7), (second, BLUE, 8)):
            client.send("start", prompt=prompt, seed=seed, seconds=20 / FPS)
        for client, prompt, seed in ((first, RED, 7), (second, BLUE, 8)):
            assert client.until("end")["reason"] == "finished"
            assert client.received.media == expected_media(pipe, prompt, seed, 3, num_frames=21)


def test_who_may_not_use_it_is_refused_through_the_proxy(ray_server: RayServer) -> None:
    own = {"Origin": f"http://127.0.0.1:{ray_server.port}"}
    for query, headers in (("", {}), ("?token=wrong", {}), ("", own), (f"?token={TOKEN}", {"Origin": "http://a.b"})):
        with pytest.raises(InvalidStatus) as error:
            ray_server.client(query, additional_headers=headers)
        assert error.value.response.status_code == 403
    with ray_server.client(additional_headers=own) as client:
        assert client.watch(prompt=RED, seconds=0.1).of("end")
    with ray_server.client("", additional_headers={"Authorization": f"Bearer {TOKEN}"}) as client:
        assert client.watch(prompt=RED, seconds=0.1).of("end")


def test_page_health_and_metrics_come_through_the_proxy(ray_server: RayServer) -> None:
    assert ray_server.get("/")[0] == 200 and "<!doctype html>" in ray_server.get("/")[1]
    assert ray_server.get("/nowhere")[0] == 404
    status, health = ray_server.get("/health")
    assert status == 200 and '"ready":true' in health and '"token_required":true' in health
    assert ray_server.get("/metrics")[0] == 403
    status, metrics = ray_server.get(f"/metrics?token={TOKEN}")
    assert status == 200 and "longlive_connections" in metrics


def test_a_replica_that_dies_ends_its_streams_alone_and_is_replaced(ray_server: RayServer) -> None:
    clients = [ray_server.client() for _ in range(4)]
    for client in clients:
        client.send("start", prompt=RED)
        client.until("chunk")
    dead, alive = ray_server.replicas()
    os.kill(dead.pid, signal.SIGKILL)

    cut, on = [], []
    for client in clients:
        before = len(client.received.of("chunk"))
        try:
            while len(client.received.of("chunk")) < before + 5:
                client.until("chunk")
            on.append(client)
        except ConnectionClosed as error:
            assert error.rcvd is None  # no close frame: no client takes this for a proper end
            cut.append(client)
    assert (len(cut), len(on)) == (2, 2)  # each went to the replica that had fewer

    with contextlib.ExitStack() as stack:  # the other one is full: who need not wait is with the replacement
        deadline = time.monotonic() + PATIENCE
        while True:
            client = stack.enter_context(ray_server.client())
            client.send("start", prompt=RED, seconds=0.1)
            message = client.next()
            if isinstance(message, dict) and message["type"] == "started":
                break
            assert time.monotonic() < deadline, "it is not replaced"
            client.socket.close()
            time.sleep(0.2)
        assert client.until("end")["num_frames"] == 5
    assert alive in ray_server.replicas() and dead not in ray_server.replicas()
    for client in on:
        client.send("stop")
        assert client.until("end", plays=False)["reason"] == "stopped"
    for client in clients:
        client.socket.close()


def test_a_signal_ends_all_streams_with_a_message(ray_server: RayServer) -> None:
    replicas = ray_server.replicas()
    with ray_server.client() as first, ray_server.client() as second, ray_server.client() as idle:
        for client in (first, second):
            client.send("start", prompt=RED)
            client.until("chunk")
        ray_server.process.terminate()
        for client in (first, second):
            end = client.until("end", plays=False)
            assert (end["reason"], end["num_frames"]) == ("server", len(client.received.media))
        for client in (first, second, idle):
            with pytest.raises(ConnectionClosed) as error:
                client.socket.recv(PATIENCE)
            assert error.value.rcvd is not None and error.value.rcvd.code == 1012
    assert ray_server.process.wait(PATIENCE) == 143
    printed = ray_server.errors.read_text()
    assert "longlive: ended by SIGTERM; all streams were ended" in printed and "Traceback" not in printed
    assert psutil.wait_procs(replicas, PATIENCE)[1] == []


def test_the_router_considers_all_replicas() -> None:
    router = object.__new__(FewestClients)
    (rank,) = asyncio.run(FewestClients.choose_replicas(router, list(range(8))))
    assert sorted(rank) == list(range(8))


def test_replicas_grow_with_the_clients_that_are_connected() -> None:
    settings = ServeSettings(max_sessions=3, max_minutes=2)
    fixed, growing = (deployment_options(settings, Replicas(2, most, num_gpus=1)) for most in (2, 5))
    assert fixed["num_replicas"] == 2 and "autoscaling_config" not in fixed
    scaling = growing["autoscaling_config"]
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (2, 5, 3)
    assert fixed["graceful_shutdown_timeout_s"] > 120  # the longest stream
    assert fixed["ray_actor_options"] == {"num_gpus": 1, "num_cpus": 1}


@pytest.mark.parametrize(
    "options, arguments",
    [
        ({}, []),
        ({"steps": 2, "max_sessions": "3"}, ["--steps=2", "--max-sessions=3"]),
        ({"no_token": "true", "compile": True, "no_lora": False, "nvfp4": "false"}, ["--no-token", "--compile"]),
        ({"origin": ["https://a.b", "https://c.d"]}, ["--origin=https://a.b", "--origin=https://c.d"]),
    ],
)
def test_options_of_an_application_are_those_of_the_command(options: dict, arguments: list[str]) -> None:
    assert list(as_arguments(options)) == arguments


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "--host 0.0.0.0 can be reached from other machines: give a --token"),
        ({"token": "a", "no_token": True}, "give either --token or --no-token, not both"),
        ({"token": "a", "port": 1}, "port is an option of Ray's proxies"),
        ({"token": "a", "stpes": 1}, "unrecognized arguments: --stpes=1"),
        ({"token": "a", "steps": 0}, "argument --steps: must be an integer from 1 to 1000, not '0'"),
        ({"token": "a", "devices": 2}, "--devices 2 and --ray exclude each other"),
        ({"token": "a", "device": "cuda:1"}, "--device cuda:1 is one device"),
    ],
)
def test_an_application_is_refused_in_one_line(options: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        app(options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_replica_that_allows_less_than_a_picture_is_refused_before_its_model_is_loaded(monkeypatch) -> None:
    monkeypatch.setattr(run_serve_ray, "load_served", lambda *args: pytest.fail("it is loaded"))
    monkeypatch.setattr(run_serve_ray, "log_to_stderr", lambda: None)
    with pytest.raises(ValueError, match="--max-pixels 10: 10 pixels are too few"):
        run_serve_ray.load_replica(parse_arguments(["serve", "--ray", "--device=cpu", "--max-pixels=10"]))


@pytest.mark.parametrize("failing", ["serve.start", "serve.delete", "serve.shutdown", None])
def test_ray_is_shut_down_whatever_fails(failing: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def call(name: str) -> None:
        called.append(name)
        if name == failing:
            raise RuntimeError(name)

    for name in ("init", "serve.start", "serve.delete", "serve.shutdown", "shutdown"):
        monkeypatch.setattr(f"ray.{name}", lambda *args, name=name, **options: call(name))
    with (
        pytest.raises(RuntimeError, match=failing) if failing else contextlib.nullcontext(),
        run_serve_ray.ray_with(Replicas(1, 1, num_gpus=0), "127.0.0.1", 1),
    ):
        called.append("block")
    begun = [] if failing == "serve.start" else ["block", "serve.delete", "serve.shutdown"]
    assert called == ["init", "serve.start", *begun, "shutdown"]


def test_an_application_takes_a_gpu_for_each_replica_unless_it_is_for_cpus() -> None:
    for device, num_gpus in (({}, 1), ({"device": "cpu"}, 0)):
        deployment = app({"token": "a", "replicas": 2, **device})._bound_deployment
        assert deployment.ray_actor_options["num_gpus"] == num_gpus and deployment.num_replicas == 2
