"""The result of distillation: the generator as it is to be used, its files and its card."""

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from torch.distributed.fsdp import FSDPModule

from longlive_diffusers import LongLivePipeline, LongLiveTransformer3DModel
from longlive_diffusers.loaders.lora_export import original_lora_state_dict
from longlive_diffusers.pipelines.sharing import render_distilled_lora_card
from objectives.distillation_networks import DistillationNetworks, Role
from run.averaging import averaged_weights
from run.distillation_arguments import DistillationArguments, NetworkArguments
from run.history import SettingsHistory
from run.lora_settings import lora_settings
from run.saving import (
    card_details,
    generation_settings,
    load_transformer,
    place_result,
    precision_in_words,
    save_pipeline,
    training_table,
)
from run.sharding import gathered


ORIGINAL_LORA = "generator_lora.pt"
INTRO = "Distribution-matching distillation (DMD), with `training/train_dmd.py` of longlive-diffusers."

# Rows of a card, and the settings that they state.
FACTS = {
    "solver steps": "num_inference_steps",
    "start": "start",
    "guidance scale of the teacher": "score_guidance_scale",
    "one timestep for each": "score_timestep",
    "latent frames of a roll-out": "num_latent_frames",
    "latent frames that the scores see": "score_latent_frames",
    "chunks with a gradient": "gradient_chunks",
    "updates of the fake score for each of the generator": "generator_interval",
    "latent frames in the KV cache": "window_size",
    "latent frames that it never evicts": "sink_size",
    "frames that opened a shot are kept": "multi_shot_sink",
    "keys and values stored as": "kv_cache_dtype",
    "distance in time positions at a cut": "multi_shot_rope_offset",
    "image conditioning": "image_conditioning",
    "optimizer": "optimizer",
    "learning rate of the generator": "learning_rate",
    "learning rate of the fake score": "critic_learning_rate",
    "schedule": "lr_scheduler",
    "warm-up steps": "lr_warmup_steps",
    "AdamW beta 1": "adam_beta1",
    "AdamW beta 2": "adam_beta2",
    "weight decay": "adam_weight_decay",
    "gradients clipped to a norm of": "max_grad_norm",
    "weights averaged with decay": "ema_decay",
    "seed": "seed",
}


class DistilledNetwork:
    """
    The generator, with its averaged weights, if an average is kept.

    Args:
        networks: The networks that are trained.
        ema: The average of the generator's trained weights, or None.
        arguments: What was started from.
        dtype: The dtype of the autoregressive model that a standalone LoRA is put onto.
    """

    def __init__(
        self, networks: DistillationNetworks, ema: EMAModel | None, arguments: NetworkArguments, dtype: torch.dtype
    ):
        self.networks, self.ema, self.arguments, self.dtype = networks, ema, arguments, dtype
        self._target: LongLiveTransformer3DModel | None = None  # what a standalone LoRA is put onto

    @property
    def transformer(self) -> LongLiveTransformer3DModel:
        """The generator's network, for its configuration."""
        return self.networks.network(Role.GENERATOR)

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the weights of the result: of the LoRA, or all of them. Every process has to call this."""
        parameters = self.networks.parameters_of(Role.GENERATOR)
        with averaged_weights(self.networks, self.ema, list(parameters.values())):
            if self.arguments.rank is None:
                return gathered(self.transformer.state_dict())
            return self._lora_layers(gathered(parameters))

    @property
    def lora_config(self) -> LoraConfig:
        """The settings of the generator's LoRA, which are a file's own where it began with one."""
        return self.transformer.peft_config[self.networks.adapter(Role.GENERATOR)]

    def _lora_layers(self, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the layers of the generator's LoRA without the name of the adapter, as PEFT saves them."""
        return get_peft_model_state_dict(
            self.transformer, state_dict=dict(parameters), adapter_name=self.networks.adapter(Role.GENERATOR)
        )

    @contextmanager
    def for_inference(self) -> Iterator[LongLiveTransformer3DModel]:
        """Yield the network as it is to be used. Every process has to call this."""
        parameters = self.networks.parameters_of(Role.GENERATOR)
        with averaged_weights(self.networks, self.ema, list(parameters.values())):
            if self.arguments.ar_model_name_or_path is not None:
                yield self._onto_target(self._lora_layers(gathered(parameters)))
                return
            if isinstance(self.networks, FSDPModule):
                self.networks.unshard()  # what is not in a block; the network is not called through this module here
            with self.networks.using(Role.GENERATOR):
                yield self.transformer

    def _onto_target(self, layers: dict[str, torch.Tensor]) -> LongLiveTransformer3DModel:
        """Put the LoRA onto the autoregressive model, which is loaded when it is first needed."""
        source, name = self.arguments.ar_model_name_or_path, "generator"
        assert source is not None
        if self._target is None:
            device = next(self.networks.parameters()).device
            self._target = load_transformer(source, self.dtype, self.transformer.config.chunk_size).to(device)
            self._target.add_adapter(self.lora_config, name)
        set_peft_model_state_dict(self._target, layers, adapter_name=name)
        return self._target.eval()


def save_distilled(
    weights: dict[str, torch.Tensor],
    result: DistilledNetwork,
    arguments: DistillationArguments,
    history: SettingsHistory,
    repo_id: str,
) -> list[str]:
    """
    Write the LoRA, or the pipeline, into the run's folder. All of it is first written to a subfolder, then moved.

    Args:
        weights: The weights of the result.
        result: The network that was trained.
        arguments: The settings of the run.
        history: The settings that were used, also before the run was resumed.
        repo_id: The name of the result on the Hub.

    Returns:
        The names of the files and folders that were written.
    """

    def write(folder: Path) -> None:
        if arguments.model.rank is None:
            settings = generation_settings(arguments.distillation)
            pipe = save_pipeline(weights, result.transformer.config, arguments.model, settings, folder)
            card = pipe.model_card(repo_id, **details(arguments))
        else:
            card = _save_lora(weights, result, arguments, folder, repo_id)
        card.text += training_table(INTRO, training_facts(arguments, history))
        card.save(folder / "README.md")

    return place_result(arguments.run.output, write, sometimes=(ORIGINAL_LORA,))


def _save_lora(
    weights: dict[str, torch.Tensor],
    result: DistilledNetwork,
    arguments: DistillationArguments,
    folder: Path,
    repo_id: str,
) -> ModelCard:
    settings, model, metadata = arguments.distillation, arguments.model, lora_settings(result.lora_config)
    LongLivePipeline.save_lora_weights(
        folder, transformer_lora_layers=weights, transformer_lora_adapter_metadata=metadata
    )
    if model.save_original_lora:
        buffer = io.BytesIO()  # of a full disk, torch itself says nothing that could be told from other errors
        torch.save(original_lora_state_dict(weights, metadata), buffer)
        (folder / ORIGINAL_LORA).write_bytes(buffer.getbuffer())
    # A local folder means nothing to others.
    is_named = model.ar_model_name_or_path is not None and not Path(model.pretrained_model_name_or_path).exists()
    trained_from = model.pretrained_model_name_or_path if is_named else None
    used = {name: value for name, value in details(arguments).items() if name in ("base_model", "fps", "prompt")}
    return render_distilled_lora_card(
        repo_id,
        num_inference_steps=settings.num_inference_steps,
        start=settings.start,
        score_context="clean" if settings.sees_clean_history else "noisy",
        trained_from=trained_from,
        rank=metadata["r"],
        teacher_guidance_scale=settings.score_guidance_scale,
        settings=generation_settings(settings),
        **used,
    )


def details(arguments: DistillationArguments) -> dict[str, Any]:
    """Return what a card says about using the result."""
    model = arguments.model
    base_model = model.ar_model_name_or_path or model.pretrained_model_name_or_path
    return card_details(arguments.run, arguments.data, base_model)


def training_facts(arguments: DistillationArguments, history: SettingsHistory) -> dict[str, str | int]:
    """Return the rows of a card: what the run was trained with."""
    optimization, settings = arguments.optimization, arguments.distillation
    videos = optimization.train_batch_size * optimization.gradient_accumulation_steps
    return {
        "updates of the fake score": optimization.max_train_steps,
        "updates of the generator": arguments.generator_updates(optimization.max_train_steps),
        "videos of an update, each data-parallel group": videos,
        "teacher": "the model to start from"
        if arguments.model.teacher_model_name_or_path is None
        else "another model",
        "generator begins with a LoRA": "no" if arguments.model.generator_lora is None else "yes",
        "history that the scores see": "clean" if settings.sees_clean_history else "noised like the chunk",
        "precision": precision_in_words(arguments.model, optimization, history),
    } | {row: history.describe(name) for row, name in FACTS.items()}
