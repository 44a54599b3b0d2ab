"""A pipeline on disk or on the Hub: what its small files say, and how it is loaded."""

import inspect
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline
from diffusers.configuration_utils import FrozenDict
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    StrictDataclassError,
)
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from ..dtypes import DTYPES
from ..loaders.lora_file import find_lora_file, read_lora_file
from ..models.transformer_longlive import LongLiveTransformer3DModel, check_config
from ..nvfp4.linear import nvfp4_layers
from ..nvfp4.quantizer import NVFP4Config, quantize_model
from ..pipelines.inputs import ModelSizes
from ..pipelines.pipeline_longlive import LongLivePipeline
from ..setting_types import check_setting_types
from ..user_path import user_path
from .complete_folder import check_complete, stored_shapes
from .config_file import read_config


_CONFIGS = ("model_index.json", "transformer/config.json", "vae/config.json")
# Third-party conversions have the layout of a Wan pipeline; LongLivePipeline loads them too.
_PIPELINES = ("LongLivePipeline", "WanPipeline")
_UNREACHABLE = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled)


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
        index, transformer, vae = (read_config(folder, name, source) for name in _CONFIGS)
        if index.get("_class_name") not in _PIPELINES:
            raise ValueError(f"'{source}' is a {index.get('_class_name')}, not a LongLivePipeline")
        with settings_of(source):
            pipeline = cls(
                source=str(folder if user_path(source).is_dir() else source),
                settings=_completed(LongLivePipeline, index),
                transformer=_completed(LongLiveTransformer3DModel, transformer),
                vae=_completed(AutoencoderKLWan, vae),
            )
            check_config(FrozenDict(pipeline.transformer))
            quantization = transformer.get("quantization_config")
            if quantization is not None and not (isinstance(quantization, dict) and "quant_method" in quantization):
                raise ValueError(f"its quantization_config is {quantization!r}, not settings with a quant_method.")
        if folder == Path(pipeline.source):
            pipeline._check_weights(folder)
        return pipeline

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
        fused_lora: str | os.PathLike | None = None,
        nvfp4_backend: str | None = None,
        attention_backend: str | None = None,
        compile: bool = False,
        fuse_loras: bool = False,
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
            fused_lora: A LoRA to add to the transformer's weights for good, before they are quantized.
            nvfp4_backend: How products with weights in 4 bits are computed; the transformer's blocks are quantized
                where they are not yet. None to leave them as they are.
            attention_backend: An attention backend of diffusers; None for its default.
            compile: Whether to compile the transformer's blocks.
            fuse_loras: Whether to add the LoRAs to the weights for good.
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
        with components_of(self.source):
            pipe = LongLivePipeline.from_pretrained(folder, dtype=torch_dtype)
        pipe.set_progress_bar_config(disable=not show_progress)
        if fused_lora is not None:
            pipe.load_lora_weights(fused_lora)
            fuse_lora(pipe)
        if nvfp4_backend is not None:
            if offload != "sequential":  # by which the whole transformer may not fit on the device
                pipe.transformer.to(device)
            use_nvfp4(pipe, nvfp4_backend)
        self._load_loras(pipe, loras)
        if loras and fuse_loras:
            fuse_lora(pipe)
        if attention_backend is not None:
            pipe.transformer.set_attention_backend(attention_backend)
        if compile:
            pipe.transformer.compile_repeated_blocks(fullgraph=True)
        if offload == "model":
            pipe.enable_model_cpu_offload(device=device)
        elif offload == "sequential":
            pipe.enable_sequential_cpu_offload(device=device)
        else:
            # diffusers warns of float16 on a CPU, for every model, that it would fail, which these do not.
            pipe.to(device, silence_dtype_warnings=True)
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
        with components_of(self.source):
            pipe = LongLivePipeline.from_pretrained(folder, dtype=dtypes)
        if lora is not None:
            self._load_loras(pipe, [(lora, 1.0)])
            fuse_lora(pipe)
        return pipe

    def _folder(self) -> Path:
        """Return the pipeline's folder, which is complete; a repository is downloaded."""
        folder = Path(self.source)
        if not folder.is_dir():
            try:
                folder = Path(DiffusionPipeline.download(self.source))
            except (OSError, HFValidationError) as error:
                raise ValueError(f"'{self.source}' cannot be downloaded: {error}") from error
            self._check_weights(folder)
        return folder

    def _check_weights(self, folder: Path) -> None:
        """Check that the pipeline is complete, by names and headers alone."""
        check_complete(folder, read_config(folder, "model_index.json", self.source), self.source)
        with settings_of(self.source):
            check_num_layers(folder / "transformer", self.transformer["num_layers"])

    @staticmethod
    def _load_loras(pipe: LongLivePipeline, loras: Sequence[tuple[str, float]]) -> None:
        """Load LoRAs, which are added up, each by its scale."""
        names = [f"lora_{number}" for number in range(len(loras))]
        for name, (lora, _) in zip(names, loras, strict=True):
            with warnings.catch_warnings():
                # PEFT asks whoever loads a second LoRA to know what they do. Each has a name of its own here, and all
                # of them are switched on below.
                warnings.filterwarnings("ignore", "Already found a `peft_config` attribute", UserWarning)
                pipe.load_lora_weights(lora, adapter_name=name)
        if loras:
            pipe.set_adapters(names, [scale for _, scale in loras])


# ------------------------------------------------------------------------------------------------------------- reading
def find_folder(
    source: str | os.PathLike, patterns: tuple[str, ...], *, ignore_patterns: tuple[str, ...] = ()
) -> Path:
    """
    Return a local folder as it is, or download the matching files of a repository on the Hub.

    Raises:
        ValueError: If there is neither a folder nor a repository that can be reached.
    """
    folder = user_path(source)
    if folder.is_dir():
        return folder
    try:
        found = snapshot_download(
            str(source), allow_patterns=list(patterns), ignore_patterns=list(ignore_patterns) or None
        )
    except _UNREACHABLE as error:
        raise ValueError(f"'{source}' is no folder, and no Hub repository that can be reached: {error}") from error
    return Path(found)


def default_settings(component_class: type) -> dict[str, Any]:
    """Return the constructor's arguments that are settings, not components: those with a default, and its value."""
    parameters = inspect.signature(component_class.__init__).parameters.values()
    return {entry.name: entry.default for entry in parameters if entry.default is not inspect.Parameter.empty}


def stored_dtype(folder: Path) -> torch.dtype:
    """Return the dtype of most of a model's stored weights, apart from those in few bits; float32 where it cannot be
    determined.

    Raises:
        ValueError: If a weight file is cut off or damaged.
    """
    names = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    counts: Counter[str] = Counter()
    for path in folder.glob("*.safetensors"):
        for shape, dtype in stored_shapes(path).values():
            if dtype in names:
                counts[dtype] += torch.Size(shape).numel()
    return names[counts.most_common(1)[0][0]] if counts else torch.float32


def check_num_layers(folder: Path, num_layers: int) -> None:
    """
    Compare the number of blocks in a transformer's weight files with that of its configuration, before a network is
    built that may be of any size.

    Raises:
        ValueError: If they differ.
    """
    names = [name for path in folder.glob("*.safetensors") for name in stored_shapes(path)]
    blocks = {int(name.split(".")[1]) for name in names if re.match(r"blocks\.\d+\.", name)}
    found = max(blocks, default=-1) + 1
    if names and found != num_layers:
        raise ValueError(
            f"Its transformer's config.json says num_layers={num_layers}, its weights have {found} blocks."
        )


def cpu_dtype(folder: Path) -> torch.dtype:
    """Return the dtype in which a model that is stored like this should run on a CPU."""
    stored = stored_dtype(folder)
    return torch.float32 if stored == torch.float16 else stored


def check_lora_file(lora: str) -> None:
    """Read a LoRA before any model is loaded, which takes longer; one on the Hub is downloaded.

    Raises:
        ValueError: If it is missing or cannot be read.
    """
    read_lora_file(find_lora_file(lora))


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


@contextmanager
def settings_of(source: str | os.PathLike) -> Iterator[None]:
    """Say of which pipeline the settings are that a check refuses."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"'{source}' cannot be opened: {error}") from error


@contextmanager
def components_of(source: str | os.PathLike) -> Iterator[None]:
    """
    Turn what the libraries raise for a damaged component of a pipeline into one error.

    Raises:
        ValueError: If a file is missing or damaged, or a configuration does not fit the weights.
    """
    try:
        yield
    except (OSError, SafetensorError, StrictDataclassError) as error:
        raise ValueError(f"A component of '{source}' cannot be loaded: {error}") from error
    except RuntimeError as error:  # torch's only name for shapes that differ, and for much else
        if "mismatch" not in str(error):
            raise
        raise ValueError(f"The weights of a component of '{source}' do not fit its configuration: {error}") from error


def _completed(component_class: type, config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration completed with the constructor's defaults, after checking the types of its values."""
    check_setting_types(config, component_class)
    defaults = default_settings(component_class)
    return {name: config.get(name, default) for name, default in defaults.items()}
