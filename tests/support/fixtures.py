"""The fixtures of the whole suite; `conftest.py` loads them where tests run."""

import gc
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.hub import Hub
from tests.support.paths import GOLDEN
from tests.support.wan_base import HEADS, save_wan_base


@pytest.fixture(scope="module", autouse=True)
def short_garbage_collections() -> None:
    """Leave what is there before a file's tests out of garbage collections, which then take milliseconds instead of
    half a second: there are hundreds of thousands of objects of modules, and accelerate collects garbage each time."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_is_pythons() -> None:
    """Also where the tests run in the background of a script, which ignores it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """An empty stand-in for the Hugging Face Hub, of the test's own."""
    with Hub(tmp_path) as server:
        yield server


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of the reference's outputs."""
    return GOLDEN


@pytest.fixture(scope="session")
def heads() -> dict[str, int]:
    """What the golden network's shapes do not show."""
    return HEADS


@pytest.fixture(scope="session")
def reference_config() -> dict:
    return json.loads((GOLDEN / "reference_config.json").read_text())


@pytest.fixture(scope="session")
def original() -> dict[str, torch.Tensor]:
    """The golden network under the reference's names, float32."""
    return load_file(GOLDEN / "reference_model.safetensors")


@pytest.fixture(scope="session")
def make_wan_base() -> Callable[..., Path]:
    return save_wan_base


@pytest.fixture(scope="session")
def wan_base(tmp_path_factory) -> Path:
    return save_wan_base(tmp_path_factory.mktemp("base") / "wan")
