"""The embedded model, once, and a server of it."""

from collections.abc import Iterator

import pytest

from longlive_diffusers.pipelines.pipeline_longlive import LongLivePipeline
from longlive_diffusers.serve.settings import ServeSettings
from tests.support.live_server import LiveServer, embedded_pipeline, running_server


@pytest.fixture(scope="package")
def pipe() -> LongLivePipeline:
    return embedded_pipeline()


@pytest.fixture(scope="module")
def server(pipe: LongLivePipeline) -> Iterator[LiveServer]:
    """A server that the tests of a file share: each leaves it without streams."""
    with running_server({None: pipe}, ServeSettings(max_sessions=3, max_queue=2)) as server:
        yield server


@pytest.fixture(autouse=True)
def _leaves_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    """After a test, the shared server has no streams and no connections."""
    yield
    if "server" in request.fixturenames:
        server = request.getfixturevalue("server")
        server.wait_until(lambda: server.is_empty)
