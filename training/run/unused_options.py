"""Options that would be passed over, because what they belong to was not asked for: they are refused.

A recipe's file may have more than is used: parts of it may be switched off on the command line, and what is written
there at its default says nothing.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from longlive_diffusers.pipelines.chunk_step import is_guided
from longlive_diffusers.user_path import user_path
from objectives.error_recycling import RecyclingSettings


Settings = Mapping[str, Any]
SECRETS = ("hub_token",)  # are not shown


@dataclass(frozen=True)
class Need:
    """
    Args:
        options: The options that need something.
        is_met: Whether settings have it.
        words: What it is, behind the name and the value of an option.
    """

    options: tuple[str, ...]
    is_met: Callable[[Settings], bool]
    words: str


def _is_local(model: str | None) -> bool:
    return model is not None and user_path(model).exists()


SHARED_NEEDS = (
    Need(
        ("revision",),
        lambda given: not _is_local(given["pretrained_model_name_or_path"]),
        "is of a repository of the Hub, and --pretrained_model_name_or_path is a folder",
    ),
    Need(("hub_token",), lambda given: given["push_to_hub"], "needs --push_to_hub true"),
    Need(("tracker_name",), lambda given: given["report_to"] not in (None, "none"), "needs --report_to"),
    Need(("ema_start_step",), lambda given: given["ema_decay"] is not None, "needs --ema_decay"),
    Need(
        ("nvfp4_recipe", "nvfp4_backend"),
        lambda given: given["precision"] == "nvfp4",
        "needs --precision nvfp4",
    ),
)
TEACHER_FORCING_NEEDS = (
    Need(
        ("lora_alpha", "lora_dropout", "lora_layers"),
        lambda given: given["rank"] is not None,
        "needs a --rank: without one, all weights train",
    ),
    Need(
        tuple(field.name for field in fields(RecyclingSettings) if field.name != "error_recycling"),
        lambda given: given["error_recycling"],
        "needs --error_recycling true",
    ),
    Need(
        ("history_noise_max_timestep",),
        lambda given: given["history_noise_probability"] > 0,
        "needs a --history_noise_probability above 0",
    ),
    Need(
        ("dataset_config_name", "dataset_split"),
        lambda given: given["dataset_name"] is not None,
        "needs --dataset_name",
    ),
    Need(
        ("caption_column",),
        lambda given: given["train_data_dir"] is not None or given["dataset_name"] is not None,
        "needs a training set: --train_data_dir or --dataset_name",
    ),
    Need(("vae_halo",), lambda given: not given["cache_latents"], "needs --cache_latents false"),
    *SHARED_NEEDS,
    Need(
        ("nvfp4_recipe", "nvfp4_backend"),
        lambda given: given["rank"] is None,
        "is how all weights train: under a LoRA (--rank), the frozen ones are only stored in 4 bits",
    ),
)
DISTILLATION_NEEDS = (
    Need(
        ("rank", "lora_alpha", "lora_layers"),
        lambda given: not given["train_all_weights"],
        "needs LoRAs: --train_all_weights true trains none",
    ),
    Need(
        ("negative_prompt",),
        lambda given: is_guided(given["score_guidance_scale"]),
        "needs guidance: a --score_guidance_scale other than 0 and 1",
    ),
    *SHARED_NEEDS,
    Need(
        ("nvfp4_recipe", "nvfp4_backend"),
        lambda given: given["train_all_weights"],
        "needs --train_all_weights true: under LoRAs, the frozen weights are only stored in 4 bits",
    ),
)


def check_needs(needs: Iterable[Need], defaults: Settings, recipe: Settings, given: Settings) -> None:
    """
    Check that no option is passed over.

    Args:
        needs: What options need.
        defaults: The settings without any option.
        recipe: Those with the options of the file, if there is one.
        given: Those with all options.

    Raises:
        ValueError: For the first option that is, and does not only come from a recipe that has what it needs.
    """
    for need in needs:
        if need.is_met(given):
            continue
        for name in need.options:
            is_switched_off = given[name] == recipe[name] and need.is_met(recipe)
            if given[name] != defaults[name] and not is_switched_off:
                value = "" if name in SECRETS else f" {given[name]}"
                raise ValueError(f"--{name}{value} {need.words}")
