"""The settings and the fixtures of the whole suite."""

import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

from tests.support.hub import Hub
from tests.support.paths import GOLDEN
from tests.support.wan_base import HEADS, save_wan_base


def pytest_configure(config: pytest.Config) -> None:
    """Nothing is looked for on the Hub, for which a machine without a network waits half a minute each time; and where
    several processes share the tests (`pytest -n 2`), each computes in one thread."""
    huggingface_hub.constants.HF_HUB_OFFLINE = True  # the variable has been read by now
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)


# Below tests/. Where several processes share the tests, each takes a whole file at a time: one that takes long, begun
# last, would leave the others without work.
LONGEST = (
    "test_triton_kernels.py",
    "models/test_transformer_compile.py",
    "training/test_train_fsdp2.py",
    "parallel/test_shared_streams.py",
    "training/test_train_dmd.py",
    "training/test_train_ar.py",
    "test_loading_matrix.py",
    "test_toy.py",
    "test_examples.py",
    "training/test_train_hub.py",
    "models/test_roll_out_gradients.py",
    "training/test_train_dmd_fsdp2.py",
    "parallel/test_failing_ranks.py",
    "cli/test_devices.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest; all others stay in their order."""
    tests = Path(__file__).parent
    ranks = {tests / name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(LONGEST)))


@pytest.fixture(scope="module", autouse=True)
def short_garbage_collections() -> None:
    """Leave what is there before a file's tests out of garbage collections, which then take milliseconds instead of
    half a second: there are hundreds of thousands of objects of modules, and accelerate collects garbage each time."""
    gc.collect()
    gc.freeze()


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
