"""`longlive env`: what a bug report needs."""

import importlib.metadata
import platform

import diffusers
import torch
from packaging.requirements import Requirement

from longlive_diffusers.benchmark.environment import PACKAGES, describe_environment
from longlive_diffusers.cli import main
from longlive_diffusers.nvfp4.backends import BACKENDS
from longlive_diffusers.version import __version__


def test_versions_device_and_backends_are_told(capsys):
    assert main(["env", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    for fact in (__version__, platform.python_version(), torch.__version__, diffusers.__version__, "libx264"):
        assert fact in printed
    assert "attention backend" in printed and "native" in printed
    for backend in BACKENDS:
        assert backend in printed


def test_every_package_that_is_needed_is_told():
    required = importlib.metadata.requires("longlive-diffusers")
    needed = {Requirement(line).name for line in required if Requirement(line).marker is None}
    assert needed == set(PACKAGES)
    assert "not installed" not in describe_environment(torch.device("cpu"))["packages"].values()


def test_a_backend_that_cannot_run_says_why():
    described = describe_environment(torch.device("cpu"))
    assert described["compute capability"] == "none (no GPU)"
    backends = described["NVFP4 backends"]
    assert backends["w4a16"] == "can run"
    assert backends["te"] != "can run" and backends["scaled_mm"] != "can run"
    assert backends[described["NVFP4 backend"]] == "can run"
