"""What the machine is, which versions run on it, and what the package would choose there."""

import importlib.metadata
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import av.codec
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from ..nvfp4.backends import BACKENDS, LayerShape, choose_backend
from ..version import __version__
from ..video.h264 import ENCODER


PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "huggingface-hub",
    "numpy",
    "av",
    "ftfy",
    "pillow",
    "psutil",
    "tqdm",
    "Jinja2",
)
OPTIONAL_PACKAGES = (
    "triton",
    "nvidia-cudnn-frontend",
    "transformer-engine",
    "flash-attn",
    "torchao",
    "torchvision",
    "xformers",
    "sageattention",
)


def versions() -> dict[str, str]:
    """Return the versions that speed depends on most."""
    return {
        "longlive_diffusers": __version__,
        "torch": torch.__version__,
        "diffusers": importlib.metadata.version("diffusers"),
        "python": platform.python_version(),
    }


def commit() -> str | None:
    """Return the commit of the checkout that this package is run from, with "+" where files differ from it; None where
    it is installed, or there is no git."""
    root, git = Path(__file__).parents[2], shutil.which("git")
    if git is None or not (root / ".git").exists():
        return None
    answers = [
        subprocess.run([git, "-C", str(root), *words], capture_output=True, text=True)
        for words in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
    ]
    if any(answer.returncode for answer in answers):  # such as a checkout of another user, which git refuses to read
        return None
    name, changes = (answer.stdout.strip() for answer in answers)
    return name + ("+" if changes else "")


def device_name(device: torch.device) -> str:
    """Return the name that the device gives itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if device.type == "cpu" and cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        return names[0] if names else platform.machine()
    return platform.processor() or platform.machine()


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Describe versions, hardware, and the backends that would be chosen on `device`, for bug reports.

    Returns:
        Descriptions by name: strings, or dicts of strings.
    """
    layer = LayerShape(3072, 3072, "mse", "mse")  # a layer of the 5B model
    backend, _ = choose_backend("auto", layer, device)
    reasons = {name: candidate.unsupported_reason(layer, device) for name, candidate in BACKENDS.items()}
    return {
        "longlive_diffusers": __version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "packages": {name: _version_of(name) or "not installed" for name in PACKAGES},
        "optional packages": {name: _version_of(name) or "not installed" for name in OPTIONAL_PACKAGES},
        "device": f"{device.type}: {device_name(device)}{_memory_of(device)}",
        "compute capability": _capability_of(device),
        "CUDA of torch": str(torch.version.cuda or "none"),
        "CPU": f"{device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads",
        "attention backend": AttentionBackendName(_AttentionBackendRegistry.get_active_backend()[0]).value,
        "NVFP4 backend": backend.name,
        "NVFP4 backends": {name: "can run" if reason is None else reason for name, reason in reasons.items()},
        "video encoder": f"{ENCODER}: {'there' if ENCODER in av.codec.codecs_available else 'missing'}",
    }


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory_of(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    return f", {torch.cuda.get_device_properties(device).total_memory / 2**30:.1f} GiB"


def _capability_of(device: torch.device) -> str:
    return ".".join(map(str, torch.cuda.get_device_capability(device))) if device.type == "cuda" else "none (no GPU)"
