"""The settings of the whole suite."""

import gc
from pathlib import Path

import pytest


# What is imported stays: to look for garbage in it, again and again, would take a fourth of the time of collecting the
# tests. The fixture `short_garbage_collections` enables it before the first test.
gc.disable()


def pytest_configure(config: pytest.Config) -> None:
    """Nothing is looked for on the Hub, for which a machine without a network waits half a minute each time; and where
    several processes share the tests (`pytest -n 2`), each computes in one thread.

    Then the process that hands out the tests runs none, and starts the others seconds earlier because it imports
    nothing."""
    if config.getoption("numprocesses", None):
        return
    import huggingface_hub
    import torch

    config.pluginmanager.import_plugin("tests.support.fixtures")
    huggingface_hub.constants.HF_HUB_OFFLINE = True  # the variable has been read by now
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)


# Below tests/. Where several processes share the tests, each takes a whole file at a time: one that takes long, begun
# last, would leave the others without work. Files that start ranks, which wait for each other, are slowed down by
# others of their kind; so the order is one in which two processes seldom have both of them such a file.
LONGEST = (
    "training/test_train_fsdp2.py",
    "test_triton_kernels.py",
    "parallel/test_shared_streams.py",
    "models/test_transformer_compile.py",
    "training/test_train_dmd_fsdp2.py",
    "parallel/test_failing_ranks.py",
    "serve/test_hostile_clients.py",
    "cli/test_devices.py",
    "training/test_train_dmd.py",
    "test_toy.py",
    "training/test_train_ar.py",
    "test_examples.py",
    "parallel/test_parallel_vae.py",
    "models/test_roll_out_gradients.py",
    "training/test_train_hub.py",
    "test_loading_matrix.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest; all others stay in their order."""
    tests = Path(__file__).parent
    ranks = {tests / name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(LONGEST)))
