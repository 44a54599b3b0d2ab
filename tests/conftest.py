"""Of the whole suite."""

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """Where several processes share the tests (`pytest -n 2`), each computes in one thread."""
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)
