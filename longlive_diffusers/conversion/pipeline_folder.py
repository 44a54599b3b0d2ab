"""A pipeline on disk or on the Hub: what its small files say, how it is loaded, and how it is saved atomically."""

import inspect
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import safe_open
from transformers.utils import logging as transformers_logging

from ..atomic_write import new_folder
from ..dtypes import DTYPES
from ..loaders.checkpoint_file import read_checkpoint_file
from ..loaders.lora import LORA_SUFFIXES, check_lora_fits
from ..models.transformer_longlive import LongLiveTransformer3DModel
from ..nvfp4.linear import nvfp4_layers, weights_of
from ..nvfp4.quantizer import NVFP4Config, quantize_model
from ..pipelines.inputs import ModelSizes
from ..pipelines.pipeline_longlive import LongLivePipeline


_CONFIGS = ("model_index.json", "transformer/config.json", "vae/config.json")
# Third-party conversions have the layout of a Wan pipeline; LongLivePipeline loads them too.
_PIPELINES = ("LongLivePipeline", "WanPipeline")


@dataclass(frozen=True)
class PipelineFolder:
    """
    A pipeline on disk or on the Hub, known by its small files.

    Args:
        source: The folder, or the repository on the Hub, as `from_pretrained` takes it.
        settings: The settings of the pipeline, by name (`window_size`, ...).
        transformer, vae: The complete configurations of the two networks.
    """

    source: str
    settings: dict[str, Any]
    transformer: dict[str, Any]
    vae: dict[str, Any]

    @classmethod
    def find(cls, source: str | os.PathLike) -> "PipelineFolder":
        """Read the settings of a pipeline; nothing large is downloaded or read.

        Raises:
            ValueError: If there is no such folder or repository, or it is not a pipeline that this package can run.
        """
        folder = find_folder(source, _CONFIGS)
        index, transformer, vae = (read_json(folder, name, source) for name in _CONFIGS)
        if index.get("_class_name") not in _PIPELINES:
            raise ValueError(f"'{source}' is a {index.get('_class_name')}, not a LongLivePipeline")
        defaults = default_settings(LongLivePipeline)
        return cls(
            source=str(folder if os.path.isdir(os.path.expanduser(source)) else source),
            settings={name: index.get(name, default) for name, default in defaults.items()},
            transformer=_complete(LongLiveTransformer3DModel, transformer),
            vae=_complete(AutoencoderKLWan, vae),
        )

    @property
    def sizes(self) -> ModelSizes:
        """The sizes that a request to this pipeline has to fit."""
        scales = (self.vae["scale_factor_spatial"], self.vae["scale_factor_temporal"])
        return ModelSizes.of_configs(self.transformer, *scales)

    def load(
        self,
        *,
        device: torch.device,
        dtype: str = "auto",
        offload: str = "none",
        loras: Sequence[tuple[str, float]] = (),
        nvfp4_backend: str | None = None,
        attention_backend: str | None = None,
        compile: bool = False,
        show_progress: bool = True,
    ) -> LongLivePipeline:
        """Load the models and bring them to the device.

        Args:
            device: The device that the models run on.
            dtype: "float32", "bfloat16", "float16", or "auto": bfloat16 on a GPU; on a CPU, the stored dtype, except
                that float16 becomes float32, because CPUs are slow in float16.
            offload: "none", or what is kept on the GPU only while it is needed: "model" for a model at a time,
                "sequential" for a layer at a time.
            loras: LoRAs, each a file, folder or repository, and its scale.
            nvfp4_backend: How products with weights in 4 bits are computed; the transformer's blocks are quantized
                where they are not yet. None to leave them as they are.
            attention_backend: An attention backend of diffusers; None for its default.
            compile: Whether to compile the transformer's blocks.
            show_progress: Whether to show progress bars while loading and generating.
        """
        if not show_progress:
            diffusers_logging.disable_progress_bar()
            transformers_logging.disable_progress_bar()
        folder = self._folder()
        if dtype == "auto":
            torch_dtype = torch.bfloat16 if device.type == "cuda" else cpu_dtype(folder / "transformer")
        else:
            torch_dtype = DTYPES[dtype]
        pipe = LongLivePipeline.from_pretrained(folder, dtype=torch_dtype)
        pipe.set_progress_bar_config(disable=not show_progress)
        if nvfp4_backend is not None:
            if offload != "sequential":  # by which the whole transformer may not fit on the device
                pipe.transformer.to(device)
            use_nvfp4(pipe, nvfp4_backend)
        self._load_loras(pipe, loras)
        if attention_backend is not None:
            pipe.transformer.set_attention_backend(attention_backend)
        if compile:
            pipe.transformer.compile_repeated_blocks(fullgraph=True)
        if offload == "model":
            pipe.enable_model_cpu_offload(device=device)
        elif offload == "sequential":
            pipe.enable_sequential_cpu_offload(device=device)
        else:
            pipe.to(device)
        return pipe

    def load_stored(self, *, dtype: str = "auto", lora: str | None = None) -> LongLivePipeline:
        """Load the models on the CPU in order to write them again.

        Args:
            dtype: The dtype of the transformer: "float32", "bfloat16", "float16", or "auto": as stored, like all else.
            lora: The file, folder or repository of a LoRA to add for good.
        """
        folder = self._folder()
        dtypes = {name: stored_dtype(folder / name) for name in ("transformer", "vae", "text_encoder")}
        if dtype != "auto":
            dtypes["transformer"] = DTYPES[dtype]
        pipe = LongLivePipeline.from_pretrained(folder, dtype=dtypes)
        if lora is not None:
            self._load_loras(pipe, [(lora, 1.0)])
            fuse_lora(pipe)
        return pipe

    def _folder(self) -> Path:
        return Path(self.source) if Path(self.source).is_dir() else Path(DiffusionPipeline.download(self.source))

    @staticmethod
    def _load_loras(pipe: LongLivePipeline, loras: Sequence[tuple[str, float]]) -> None:
        """Load LoRAs, which are added up, each by its scale."""
        weights = {f"lora_{number}": pipe.lora_state_dict(lora) for number, (lora, _) in enumerate(loras)}
        for lora in weights.values():  # before any is loaded, which renames the layers
            check_lora_fits(lora, weights_of(pipe.transformer))
        for name, lora in weights.items():
            pipe.load_lora_weights(lora, adapter_name=name)
        if weights:
            pipe.set_adapters(list(weights), [scale for _, scale in loras])


# ------------------------------------------------------------------------------------------------------------- reading
def find_folder(
    source: str | os.PathLike, patterns: tuple[str, ...], *, ignore_patterns: tuple[str, ...] = ()
) -> Path:
    """
    Return a local folder as it is, or download the matching files of a repository on the Hub.

    Raises:
        ValueError: If there is neither a folder nor a repository that can be reached.
    """
    folder = Path(os.path.expanduser(source))
    if folder.is_dir():
        return folder
    try:
        found = snapshot_download(
            str(source), allow_patterns=list(patterns), ignore_patterns=list(ignore_patterns) or None
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ValueError(f"'{source}' is no folder, and no Hub repository that can be reached: {error}") from error
    return Path(found)


def read_json(folder: Path, name: str, source: str | os.PathLike) -> dict[str, Any]:
    """
    Read one configuration file of a pipeline.

    Args:
        folder: The folder of the pipeline.
        name: The file in it, for instance `vae/config.json`.
        source: What the user calls the pipeline, for error messages.

    Raises:
        ValueError: If there is no such file, or it is not a JSON object.
    """
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"'{source}' is not a pipeline: it has no {name}") from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{name} of '{source}' is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name} of '{source}' holds a {type(content).__name__}, not an object")
    return content


def default_settings(component_class: type) -> dict[str, Any]:
    """Return the constructor's arguments that are settings, not components: those with a default, and its value."""
    parameters = inspect.signature(component_class.__init__).parameters.values()
    return {entry.name: entry.default for entry in parameters if entry.default is not inspect.Parameter.empty}


def stored_dtype(folder: Path) -> torch.dtype:
    """Return the dtype of most of a model's stored weights, apart from those in few bits; float32 where it cannot be
    determined."""
    names = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    counts: Counter[str] = Counter()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dictionary
                tensor = file.get_slice(name)
                if tensor.get_dtype() in names:
                    counts[tensor.get_dtype()] += torch.Size(tensor.get_shape()).numel()
    return names[counts.most_common(1)[0][0]] if counts else torch.float32


def cpu_dtype(folder: Path) -> torch.dtype:
    """Return the dtype in which a model that is stored like this should run on a CPU."""
    stored = stored_dtype(folder)
    return torch.float32 if stored == torch.float16 else stored


def check_lora_file(lora: str) -> None:
    """Raise a ValueError, before any model is loaded, if a LoRA named as a file is missing or cannot be read."""
    if Path(lora).suffix in LORA_SUFFIXES and not Path(lora).is_file():
        raise ValueError(f"there is no LoRA file '{lora}'")
    if Path(lora).is_file():
        read_checkpoint_file(lora)


def use_nvfp4(pipe: LongLivePipeline, backend: str) -> None:
    """Let the transformer's blocks multiply by weights in 4 bits; those that have other weights are quantized."""
    if layers := nvfp4_layers(pipe.transformer):
        for layer in layers.values():
            layer.set_backend(backend)
    else:
        quantize_model(pipe.transformer, NVFP4Config(backend=backend))


def fuse_lora(pipe: LongLivePipeline) -> None:
    """Add the loaded LoRA to the transformer's weights for good."""
    pipe.fuse_lora(components=["transformer"])
    pipe.unload_lora_weights()


def _complete(model: type, config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration completed with the defaults of its model, which is built without memory for weights."""
    known = {name: value for name, value in config.items() if name in default_settings(model)}
    with init_empty_weights():
        return dict(model(**known).config)


# ------------------------------------------------------------------------------------------------------------- writing
def check_output(output: Path) -> None:
    """
    Check that an output folder can be written.

    Raises:
        ValueError: If the folder is a file, or is not empty.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"The output {output} is a file; give a folder that does not exist yet.")
    if output.is_dir() and (found := len(list(output.iterdir()))):
        raise ValueError(f"The output {output} already holds {found} files or folders; give a new or an empty folder.")


def save_atomically(pipeline: DiffusionPipeline, output: Path) -> None:
    """Save a pipeline so that the folder appears under its name only when it is complete."""
    with new_folder(output) as unfinished:
        pipeline.save_pretrained(unfinished)
